#!/bin/bash
# Build step of a buildpack: exports a model into the layer directory $1, in a temporary environment, and links it into the app.
# ARCH, WEIGHTS and PRECISION come from the build's environment: `pack build --env WEIGHTS=pretrained`.
set -euo pipefail

environment=$(mktemp -d)
python -m venv --without-pip "$environment"
PIP_NO_CACHE_DIR=1 sh model_export/install.sh "$environment/bin/python"
"$environment/bin/python" -m model_export \
  --arch "${ARCH:-alexnet}" --weights "${WEIGHTS:-auto}" --precision "${PRECISION:-fp32}" --output "$1/model"
printf '[types]\nlaunch = true\n' > "$1/model.toml"
ln -s "$1/model" model
rm -rf "$environment" model_export requirements requirements-*.txt constraints.txt
# Compiled here, because the server cannot write to its directory. Checked by hash, because files in the image have no modification times.
python -m compileall -q --invalidation-mode checked-hash .
