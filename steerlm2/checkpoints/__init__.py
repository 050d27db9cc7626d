"""What is on disk: weights as Hugging Face safetensors, and the states that runs continue from.

safetensors_io   tensors of a folder, read and written part by part
hf_names         their names and layouts, in Hugging Face's folders and in torchtune's models
checkpointer     a folder: config.json, tokenizer and weights
weights          into and out of a model that is laid out over processes
training_state   what a stopped run continues from
quantized_state  the same for 8-bit optimizers
"""

from steerlm2.checkpoints.checkpointer import HFCheckpointer

__all__ = ["HFCheckpointer"]
