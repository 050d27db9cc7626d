"""A run's folder, logs and metrics, and the monitoring of its ranks.

entry          the command line of a recipe
processes      joining the processes of a run that doesn't train
output         the output folder; files of an earlier run are moved out of the way
lock           one run at a time in a folder
record         config, revisions and machines of the run
logs           a log file for each rank; progress on a terminal or in lines
metrics        metrics.jsonl, its table and its curves
resumable      a JSONL output that a stopped run continues
stopping       SIGTERM
stragglers     ranks that are slower than the others
hangs          the hang watch: ranks that the others wait for in vain
hang_notes     the text of its report
child_process  a command that ends with the process that started it
on_node        passes SIGTERM on to the ranks of a node
"""
