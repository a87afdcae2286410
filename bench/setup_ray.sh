#!/bin/sh
# Make the virtual environment in which the original Ray is measured; do nothing where it exists.
# Prints the path of its interpreter. Usage: setup_ray.sh [python to make it with]
set -eu

directory="$(cd "$(dirname "$0")" && pwd)/.venv-ray"
python="${1:-python3}"

if [ ! -e "$directory/complete" ]; then
    rm -rf "$directory"
    "$python" -m venv "$directory" >&2
    "$directory/bin/python" -m pip install --quiet --disable-pip-version-check 'ray==2.60.*' numpy >&2
    "$directory/bin/python" -c 'import ray; assert ray.__version__.startswith("2.60.")' >&2
    touch "$directory/complete"
fi
echo "$directory/bin/python"
