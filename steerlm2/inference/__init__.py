"""What answers and scores: engines that sample, the attribute model, clients of servers."""
