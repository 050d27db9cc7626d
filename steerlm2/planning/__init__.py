"""What a training run will need, found out without GPUs and without weights.

gpus      what the cards can do
jobs      what each training recipe computes in a step, over records of given lengths
tracker   memory, FLOPs and collectives of whatever runs under it, real or fake
trace     a step of the laid-out model with fake tensors on a fake process group
estimate  seconds and GPU-hours from a trace
advice    what to change where a run doesn't fit
"""
