"""For the PYTHONPATH of test_vllm.py's servers: their engine is a fork, which need not import again
what the server has imported. vLLM does so by itself but on a CPU."""

import multiprocessing

_get_context = multiprocessing.get_context
multiprocessing.get_context = lambda method=None: _get_context(
    "fork" if method == "spawn" else method
)
