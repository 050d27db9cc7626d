"""What a training run tells about itself while it runs.

run_record   what it was: config, revisions, machines; for the metric logger too
rank_log     what each rank has to say, in a file of its own; progress on a terminal or in lines
stragglers   which rank the others wait for
hang_watch   who is missing when no rank comes further
hang_notes   what the ranks tell each other about that
"""
