"""The command that serves a checkpoint with vLLM, for the `server` of a recipe.

    python -m steerlm2.generation.vllm_command DIR --gpus 8
    $(python -m steerlm2.generation.vllm_command DIR --gpus 8 --port 8001) > vllm.log 2>&1 &

vLLM pins other packages than steerlm2: give it a virtual environment of its own.
"""

from __future__ import annotations

import argparse
import json
import shlex
from pathlib import Path

from steerlm2.training.hf_checkpoint import INDEX_FILE

SHARE_FOR_WEIGHTS = 0.6
"""Of a GPU's memory; the rest is for keys and values."""


def vllm_command(
    checkpoint_dir: str | Path,
    gpus: int,
    *,
    max_seq_len: int = 4096,
    host: str = "127.0.0.1",
    port: int = 8000,
    gpu_gib: float = 80,
    python: str = "python",
) -> list[str]:
    """The words of the command: as few GPUs as hold the weights share a copy of the model
    (tensor parallel), and there are as many copies as the GPUs are enough for (data parallel).

    Args:
        checkpoint_dir: a Hugging Face folder: downloaded, or exported by a recipe.
        gpus: 0 serves on the CPU, in float32.
        max_seq_len: tokens of a prompt with a response.
        gpu_gib: memory of one GPU.
        python: the interpreter of the environment that has vLLM.

    Raises:
        FileNotFoundError: where there is no checkpoint.
        ValueError: where its weights don't fit, or its heads can't be split as it would need.
    """
    folder = Path(checkpoint_dir)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"{folder.absolute()} has no config.json: give the folder of a Hugging Face checkpoint"
        )
    words = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    words += ["--host", host, "--port", str(port), "--max-model-len", str(max_seq_len)]
    # Without it vLLM takes sampling defaults from the checkpoint.
    words += ["--generation-config", "vllm"]
    if gpus == 0:
        environment = ["env", "VLLM_CPU_KVCACHE_SPACE=1"]
        return [
            *environment,
            *words,
            *("--dtype", "float32", "--enforce-eager", "--no-enable-chunked-prefill"),
        ]
    gpus_of_a_copy = _tensor_parallel(folder, gpus, gpu_gib)
    words += ["--dtype", "bfloat16", "--tensor-parallel-size", str(gpus_of_a_copy)]
    return [*words, "--data-parallel-size", str(gpus // gpus_of_a_copy)]


def _tensor_parallel(folder: Path, gpus: int, gpu_gib: float) -> int:
    config = json.loads((folder / "config.json").read_text())
    heads = config.get("num_key_value_heads") or config["num_attention_heads"]
    gib = _weight_bytes(folder) / 2**30
    for size in range(1, gpus + 1):
        splits = gpus % size == 0 and config["num_attention_heads"] % size == 0
        # vLLM gives every rank a copy of a key/value head where there are more ranks than heads.
        splits = splits and (heads % size == 0 or size % heads == 0)
        if splits and gib / size <= SHARE_FOR_WEIGHTS * gpu_gib:
            return size
    raise ValueError(
        f"{folder} has {gib:.0f} GiB of weights, which can't be split over {gpus} GPUs of "
        f"{gpu_gib:g} GiB so that they take at most {SHARE_FOR_WEIGHTS:.0%} of each: use more GPUs"
    )


def _weight_bytes(folder: Path) -> int:
    """By the index, which is there before the files are."""
    index = folder / INDEX_FILE
    if index.is_file():
        total: int = json.loads(index.read_text())["metadata"]["total_size"]
        return total
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m steerlm2.generation.vllm_command",
        description="Print the command that serves a checkpoint with vLLM.",
    )
    parser.add_argument("checkpoint_dir")
    parser.add_argument("--gpus", type=int, required=True, help="0: serve on the CPU")
    parser.add_argument("--max-seq-len", type=int, default=4096)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--gpu-gib", type=float, default=80, help="memory of one GPU")
    parser.add_argument("--python", default="python", help="of the environment that has vLLM")
    args = parser.parse_args()
    try:
        command = vllm_command(
            args.checkpoint_dir,
            args.gpus,
            max_seq_len=args.max_seq_len,
            host=args.host,
            port=args.port,
            gpu_gib=args.gpu_gib,
            python=args.python,
        )
    except (ValueError, OSError) as error:
        parser.exit(1, f"error: {error}\n")
    print(shlex.join(command))


if __name__ == "__main__":
    main()
