#!/bin/sh
# Installs the requirements of the export for an interpreter: sh model_export/install.sh PYTHON
# TORCH_INDEX_URL is the index of torch's CPU builds. If it is empty or unreachable, torch comes from pip's own index,
# whose builds need 3 GB of CUDA libraries. PIP is the pip command to run.
set -eu
cd "$(dirname "$0")/.."
index=${TORCH_INDEX_URL-https://download.pytorch.org/whl/cpu}
python=$1

install() {
  ${PIP:-pip} --disable-pip-version-check --python "$python" install --quiet "$@"
}

if [ -n "$index" ]; then
  pins=$(grep -o '^torch[a-z]*==[0-9.]*' requirements/export.txt)
  # shellcheck disable=SC2086 the pins are separate arguments
  install --retries 1 --no-deps --index-url "$index" $pins 2>/dev/null ||
    echo "cannot install torch from $index: using the build of pip's own index"
fi
install -r requirements-export.txt
