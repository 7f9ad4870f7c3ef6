# Installs the kit beside this file, without the internet and without touching the machine's own
# packages. To be read into a bash shell, whose environment it sets:
#
#     source build/gpu-kit/install.sh

kit=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python3 -m pip install --quiet --no-index --no-deps --no-compile --upgrade --target "$kit/site" \
  "$kit"/wheels/*.whl
export PYTHONPATH="$kit/site${PYTHONPATH:+:$PYTHONPATH}"
if test -e "$kit/cute.tar.xz"; then
  python3 -m tarfile --filter data --extract "$kit/cute.tar.xz" "$kit/site"
  # What its .pth file would add, were it among the machine's own packages.
  PYTHONPATH="$kit/site/nvidia_cutlass_dsl/dsl_packages:$PYTHONPATH"
fi
export TRITON_CACHE_DIR="$kit/triton-cache"
