#!/bin/bash
# A buildpack's step: exports a model into its layer $1, from an environment that is thrown away, and links it into the app.
# ARCH, WEIGHTS and PRECISION are taken from the build's environment: `pack build --env WEIGHTS=pretrained`.
set -euo pipefail

environment=$(mktemp -d)
python -m venv --without-pip "$environment"
PIP_NO_CACHE_DIR=1 sh model_export/install.sh "$environment/bin/python"
"$environment/bin/python" -m model_export \
  --arch "${ARCH:-alexnet}" --weights "${WEIGHTS:-auto}" --precision "${PRECISION:-fp32}" --output "$1/model"
printf '[types]\nlaunch = true\n' > "$1/model.toml"
ln -s "$1/model" model
rm -rf "$environment" model_export requirements requirements-*.txt constraints.txt
# The server cannot write where it runs. By hash, since an image's files have no times.
python -m compileall -q --invalidation-mode checked-hash .
