"""Files of a run: weights as Hugging Face safetensors, and the states that runs continue from.

safetensors_io   tensors of a folder, read and written part by part
hf_names         their names and row order, in Hugging Face's folders and in torchtune's models
checkpointer     a folder: config.json, tokenizer and weights
weights          loading and saving a model that is laid out over processes
training_state   the state that a stopped run continues from
quantized_state  the moments of 8-bit, 4-bit and float8 optimizers in such a state
"""

from steerlm2.checkpoints.checkpointer import HFCheckpointer

__all__ = ["HFCheckpointer"]
