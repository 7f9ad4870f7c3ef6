# Installs the kit beside this file, without the internet and without touching the machine's own
# packages. To be read into a bash shell, whose environment it sets:
#
#     source build/gpu-kit/install.sh

kit=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python3 -m pip install --quiet --no-index --no-deps --no-compile --upgrade --target "$kit/site" \
  "$kit"/wheels/*.whl
if test -e "$kit/cute.tar.xz"; then
  python3 -m tarfile --extract "$kit/cute.tar.xz" "$kit/site"
fi
export PYTHONPATH="$kit/site${PYTHONPATH:+:$PYTHONPATH}"
export TRITON_CACHE_DIR="$kit/triton-cache"
