# megatron_mhc on NVIDIA's PyTorch image, which brings PyTorch, Triton and Transformer Engine.
#
#   docker build --build-arg BASE=<NVIDIA's PyTorch image, with its tag> -t megatron_mhc .
#   docker run --gpus all --ipc=host --rm -it megatron_mhc python -m megatron_mhc doctor
#
# The tag must have Python 3.12, PyTorch 2.9 or later and Transformer Engine 2.19 or later.
ARG BASE
FROM ${BASE}

ARG MEGATRON_CORE=0.19.2
WORKDIR /opt/megatron_mhc
COPY . .
# --no-deps: the image's PyTorch, Triton and NumPy stay; what Megatron and the tools want besides.
RUN pip install --no-cache-dir --no-deps "megatron-core==${MEGATRON_CORE}" . \
    && pip install --no-cache-dir einops matplotlib packaging psutil safetensors tensorboard tqdm
# from here an import finds what was installed, not the source
WORKDIR /workspace
RUN python -c 'import torch, transformer_engine, megatron_mhc.spec'
CMD ["python", "-m", "megatron_mhc", "doctor"]
