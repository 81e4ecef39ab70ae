#!/bin/sh
# The steps of infra/Dockerfile, each by its name, so that a test runs the same ones without a daemon; `run` is the image's
# entry point. TORCH=cpu leaves CUDA out.
set -eu
case "$1" in
    environment)
        python3 -m venv "$VIRTUAL_ENV"
        "$VIRTUAL_ENV/bin/pip" install --quiet --disable-pip-version-check uv
        ;;
    packages)
        # What the project needs, without the project. For TORCH=cpu from torch's own index of wheels without CUDA, in the
        # pinned versions.
        backend=""
        [ "${TORCH:-cuda}" = cuda ] || backend="--torch-backend=$TORCH"
        # shellcheck disable=SC2086
        "$VIRTUAL_ENV/bin/uv" pip compile --quiet --no-header --no-annotate --no-emit-index-url --extra offline --extra serve $backend \
            --constraint constraints.txt pyproject.toml -o "$VIRTUAL_ENV/requirements.txt"
        # shellcheck disable=SC2086
        "$VIRTUAL_ENV/bin/uv" pip install $backend --requirement "$VIRTUAL_ENV/requirements.txt"
        ;;
    code)
        "$VIRTUAL_ENV/bin/uv" pip install --no-deps --editable .
        ;;
    run)
        shift
        python -c 'import importlib.metadata as m, os, platform, sys
print("fsdino", m.version("fsdino"), os.environ.get("FSDINO_COMMIT", "unknown")[:12], "python", platform.python_version(),
      *(f"{name} {m.version(name)}" for name in ("ray", "torch", "mlflow", "zarr")), file=sys.stderr)'
        exec "$@"
        ;;
    *)
        echo "image.sh $1: expected environment, packages, code or run" >&2
        exit 2
        ;;
esac
