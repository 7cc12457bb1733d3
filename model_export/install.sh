#!/bin/sh
# Installs what the export needs into the environment of an interpreter: sh model_export/install.sh PYTHON
# TORCH_INDEX_URL is where CPU builds of torch come from; where it is empty, or out of reach, pip's own index has builds
# that bring 3 GB of CUDA. PIP is the pip to call.
set -eu
cd "$(dirname "$0")/.."
index=${TORCH_INDEX_URL-https://download.pytorch.org/whl/cpu}
python=$1

install() {
  ${PIP:-pip} --disable-pip-version-check --python "$python" install --quiet "$@"
}

if [ -n "$index" ]; then
  pins=$(grep -o '^torch[a-z]*==[0-9.]*' requirements/export.txt)
  # shellcheck disable=SC2086 two arguments are meant
  install --retries 1 --no-deps --index-url "$index" $pins 2>/dev/null ||
    echo "no torch from $index: taking the build of pip's own index"
fi
install -r requirements-export.txt
