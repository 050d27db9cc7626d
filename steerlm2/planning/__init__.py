"""Memory, FLOPs, traffic and time of a training run, predicted without GPUs and without weights.

gpus      memory and rates of GPUs
jobs      the optimizer steps of each training recipe, for records of given lengths
tracker   a dispatch mode that counts memory, FLOPs and collectives, on real or fake tensors
trace     a step of the laid-out model with fake tensors on a fake process group
estimate  seconds and GPU-hours from a trace
advice    changes of a config that make a run fit into memory
"""
