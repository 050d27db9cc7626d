"""Sources: where records come from. Each is a module of its own with one or two functions.

    NAME_groups(source, *, seed=..., system_prompt=..., ...) -> Iterator[Record]
        SteerLM2 groups: prompts with several responses whose log P(a|x,y) is known
    NAME_conversations(source, *, seed=..., system_prompt=..., ...)
        labelled conversations, for supervised fine-tuning and regression

A source reads its input as a stream, keeps the order of its input, and reports all bad lines of a
file at once, after its last good record (`LineProblems`). It depends on `seed` and its arguments
alone. The recipe prepare_data calls the function that its config names as `builder`; functions
outside this package work as well.
"""

DEFAULT_SYSTEM_PROMPT = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
"""The published SteerLM models were trained with this one."""
