#!/usr/bin/env bash
# Tries the project with another torch, in an environment of its own:
#
#   bash tests/compat.sh VERSION [FOLDER]
#
# VERSION is 2.11 (its newest patch) or 2.11.0. FOLDER keeps the environment for the next call;
# without it a temporary one is made and removed. uv installs it, where there is uv, otherwise pip,
# each from where it is told to look: UV_TORCH_BACKEND=cpu makes uv take PyTorch's CPU build, which
# is enough and a tenth of the size.
set -euo pipefail

# Two saves by one writer and by each training recipe, which then resume; FlexAttention as on a GPU
# up to its kernels; log-probs and scores of exported folders in transformers; FSDP2; torchao's 4 and
# 8 bits; torchtune's private parts.
tests=(
    tests/checkpoints/test_training_state.py::test_a_resumed_run_equals_the_uninterrupted_one
    tests/checkpoints/test_training_state.py::test_a_failed_save_does_not_prevent_the_next
    tests/recipes/test_training_recipes.py::test_resumed_beyond_a_smaller_max_steps_the_export_is_of_the_steps_done
    tests/models/test_attention.py::test_blocks_equal_the_dense_mask
    tests/models/test_attention.py::test_flex_attention_equals_the_dense_mask
    tests/models/test_attention.py::test_compiled_flex_attention_has_the_gradients_of_the_dense_mask
    tests/models/test_decoders.py::test_log_probs_are_transformers
    tests/training/test_forward.py::test_targets_are_transformers
    tests/training/test_forward.py::test_scores_are_transformers
    tests/distributed/test_parallelize.py::test_fsdp_over_one_process_changes_no_number
    tests/checkpoints/test_quantized_state.py
    tests/models/test_nf4.py
    tests/training/test_float8.py::test_log_probs_and_gradients_are_near_the_plain_ones
    tests/test_torchtune_private.py
)

if (($# < 1 || $# > 2)); then
    echo "usage: bash tests/compat.sh VERSION [FOLDER], such as: bash tests/compat.sh 2.11" >&2
    exit 2
fi
version=$1
[[ $version == *.*.* ]] || version+=".*"
if (($# == 2)); then
    mkdir -p "$2"
    folder=$(cd "$2" && pwd)
else
    folder=$(mktemp -d)
    trap 'rm -rf "$folder"' EXIT
fi
cd "$(dirname "${BASH_SOURCE[0]}")/.."
unset PYTHONPATH VIRTUAL_ENV

packages=("torch==$version" -e ".[dev]")
if command -v uv >/dev/null; then
    # uv doesn't read pip's variables.
    [[ -z ${PIP_FIND_LINKS:-} ]] || export UV_FIND_LINKS=${UV_FIND_LINKS:-$PIP_FIND_LINKS}
    [[ -z ${PIP_INDEX_URL:-} ]] || export UV_DEFAULT_INDEX=${UV_DEFAULT_INDEX:-$PIP_INDEX_URL}
    uv venv --quiet --allow-existing --python "$(command -v python3)" "$folder"
    uv pip install --quiet --python "$folder/bin/python" "${packages[@]}"
else
    python3 -m venv "$folder"
    "$folder/bin/python" -m pip install --quiet "${packages[@]}"
fi
echo "installed in $SECONDS s:"
"$folder/bin/python" - torch torchtune torchao transformers numpy <<'END'
import sys
from importlib.metadata import version

print("Python", sys.version.split()[0])
for package in sys.argv[1:]:
    print(package, version(package))
END

status=0
"$folder/bin/python" -m pytest --quiet --show-capture=no "${tests[@]}" || status=$?
((status == 0)) && result=passed || result=FAILED
echo "torch $1: $result after $SECONDS s"
exit "$status"
