# The model is exported, the server's requirements installed, and both copied to an image that has neither pip nor torch.
#   docker build --build-arg WEIGHTS=pretrained --build-arg PRECISION=fp32 --build-arg ARCH=alexnet -t pinnace .
FROM python:3.11-slim-bookworm AS base


FROM base AS export
WORKDIR /export
COPY requirements requirements
COPY constraints.txt requirements.txt requirements-export.txt ./
COPY model_export/install.sh model_export/
# Where CPU builds of torch come from; empty means pip's own index.
ARG TORCH_INDEX_URL
RUN PIP_NO_CACHE_DIR=1 sh model_export/install.sh /usr/local/bin/python
COPY pinnace pinnace
COPY model_export model_export
ARG ARCH=alexnet
ARG WEIGHTS=pretrained
ARG PRECISION=fp32
# Here and below: without times of their own the same files are the same layer, whatever was built anew.
RUN python -m model_export --arch "$ARCH" --weights "$WEIGHTS" --precision "$PRECISION" --output /app/model \
  && find /app -exec touch --date=@0 {} +


FROM base AS install
WORKDIR /install
COPY requirements requirements
COPY constraints.txt requirements.txt requirements-gpu.txt requirements-storage.txt requirements-ray.txt ./
# cpu, or gpu for CUDA; true for a server that downloads models itself, with --storage_uri; true for --engine=ray.
ARG DEVICE=cpu
ARG STORAGE=false
ARG RAY=false
RUN python -m venv --without-pip /opt/venv \
  && python -m pip --python /opt/venv/bin/python install --no-cache-dir --no-compile \
    --requirement "$(test "$DEVICE" = gpu && echo requirements-gpu.txt || echo requirements.txt)" \
    $(test "$STORAGE" = true && echo --requirement requirements-storage.txt) \
    $(test "$RAY" = true && echo --requirement requirements-ray.txt)
# Off with what is never loaded: a second copy of ONNX Runtime, and what its, numpy's and Swagger's
# developers need. Nobody edits these files, so their compiled forms need no times.
RUN cd /opt/venv/lib/python3.11/site-packages \
  && rm -rf onnxruntime/capi/libonnxruntime.so.* onnxruntime/transformers onnxruntime/quantization onnxruntime/tools \
    numpy/f2py numpy/_core/include numpy/_core/lib \
  && find . \( -type d -name tests -o -name '*.js.map' \) -prune -exec rm -rf {} + \
  && python -m compileall -q --invalidation-mode unchecked-hash . \
  && find /opt/venv -exec touch --no-dereference --date=@0 {} +


FROM base AS code
WORKDIR /app
COPY app.py ./
COPY pinnace pinnace
# Compiled here, since the image is read-only where it runs. Checked by hash: a file that is replaced later counts.
RUN python -m compileall -q --invalidation-mode checked-hash . && find . -exec touch --date=@0 {} +


FROM base
# Python's own library comes without compiled forms, and here they could not be kept: each start took 0.2 s more.
RUN cd /usr/local/lib/python3.11 && rm -rf site-packages/* ensurepip /usr/local/bin/pip* \
  && python -m compileall -q --invalidation-mode unchecked-hash -l . \
  && python -m compileall -q --invalidation-mode unchecked-hash asyncio collections concurrent ctypes email encodings \
    html http importlib json logging multiprocessing re tomllib urllib wsgiref \
  && find . \( -type d -o -name '*.pyc' \) -exec touch --date=@0 {} +
# From what changes least to what changes most: new code ships kilobytes, a new model ships the model.
COPY --from=install /opt/venv /opt/venv
COPY --from=export /app/model /app/model
COPY --from=code /app /app
# What is downloaded goes where something writable is mounted, on a read-only root.
ENV PATH=/opt/venv/bin:/usr/local/bin:/usr/bin:/bin PYTHONUNBUFFERED=1 XDG_CACHE_HOME=/tmp
WORKDIR /app
USER 1000:1000
EXPOSE 8080 8081
HEALTHCHECK --interval=30s --timeout=5s --start-period=30s CMD ["python", "-m", "pinnace.process.healthcheck"]
ENTRYPOINT ["python", "app.py"]
LABEL org.opencontainers.image.title="pinnace" \
  org.opencontainers.image.description="A torchvision classifier behind KServe's REST V1, V2 and gRPC protocols"
