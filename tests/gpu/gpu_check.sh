#!/usr/bin/env bash
# gpu_check.py on a machine that has PyTorch but not the project's other packages. In the project's
# root:
#
#   bash tests/gpu/gpu_check.sh [arguments of gpu_check.py]
#
# Installs the wheels in $WHEELS (or beside this file) where packages are missing, and makes
# `tune run` know the recipes of the source tree, which needn't be built or installed. Writes only
# to $SITE, $OUT and gpu_check.py's --work. The README beside this file says where wheels are from.
set -u
here=$(cd "$(dirname "$0")" && pwd)
wheels=${WHEELS:-$here}
site=${SITE:-${TMPDIR:-/tmp}/site}
export OUT=${OUT:-${TMPDIR:-/tmp}/gpu_check_out}
if [[ ! -f steerlm2/_tune.pth ]]; then
    echo "run this in the project's root" >&2
    exit 2
fi
mkdir -p "$OUT" "$site"

missing='import importlib.util as util, sys
sys.exit(all(util.find_spec(n) for n in ("torchtune", "torchao", "torchdata", "datasets", "omegaconf")))'
if PYTHONPATH=$site python3 -c "$missing" && compgen -G "$wheels/*.whl" >/dev/null; then
    python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade \
        --root-user-action=ignore --target "$site" "$wheels"/*.whl || exit 3
    echo "packages installed in $SECONDS s"
fi
# The start-up file is read because $site is made a site folder; the package lies in the root.
cp steerlm2/_tune.pth "$site/steerlm2_tune.pth"
printf 'import os, site\n\nsite.addsitedir(os.path.dirname(os.path.abspath(__file__)))\n' \
    > "$site/sitecustomize.py"
export PYTHONPATH="$site:$PWD" PATH="$site/bin:$PATH" PYTHONUNBUFFERED=1 STEERLM2_TRACEBACK=1
exec python3 "$here/gpu_check.py" "$@"
