#!/bin/sh
# The steps of infra/Dockerfile, each by its name, so that a test runs the same ones without a daemon; `run` is the image's
# entry point. TORCH=cpu leaves CUDA out.
set -eu
case "$1" in
    environment)
        python3 -m venv "$VIRTUAL_ENV"
        "$VIRTUAL_ENV/bin/pip" install --no-cache-dir --quiet --disable-pip-version-check uv
        ;;
    packages)
        # What the project needs, without the project.
        "$VIRTUAL_ENV/bin/uv" pip compile --quiet --no-header --no-annotate --no-emit-index-url --extra offline \
            --constraint constraints.txt pyproject.toml -o /tmp/requirements.txt
        if [ "${TORCH:-cuda}" = cpu ]; then
            # The publisher's own index has wheels without CUDA; the pinned versions stay.
            "$VIRTUAL_ENV/bin/uv" pip install --no-cache --torch-backend cpu --requirement /tmp/requirements.txt
        else
            "$VIRTUAL_ENV/bin/uv" pip install --no-cache --requirement /tmp/requirements.txt
        fi
        rm /tmp/requirements.txt
        ;;
    code)
        "$VIRTUAL_ENV/bin/uv" pip install --no-cache --no-deps --editable .
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
