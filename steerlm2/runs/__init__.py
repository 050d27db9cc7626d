"""A run's folder, and what watches over the run.

entry       the command line of a recipe
output      the folder; nothing that an earlier run left there is overwritten
lock        one run at a time in a folder
record      what the run was: config, revisions, machines
logs        what each rank has to say, in a file of its own; progress on a terminal or in lines
metrics     metrics.jsonl, its table and its curves
resumable   a JSONL output that a stopped run continues
stopping    SIGTERM
stragglers  which rank the others wait for
hangs       who is missing when no rank is making progress
hang_notes  what the ranks tell each other about that
background  a process that ends with the one that started it
on_node     passes SIGTERM on to the ranks of a node
"""
