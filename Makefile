# `make demo` and `make test` set up everything they need, in .venv; both are safe to run again.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/ready
FAST := not slow and not gpu

.PHONY: demo predict test test-slow check mlflow clean

demo: $(READY)
	@$(BIN)/python -m pipelines.demo

predict: $(READY)
	@$(BIN)/python -m pipelines.predict --class person examples/astronaut.jpg=examples/astronaut.png \
		--query examples/camera.jpg --format mask overlay --out outputs/predict

mlflow: $(READY)
	@echo "http://127.0.0.1:5000/#/experiments?workflowType=machine_learning" >&2
	@$(BIN)/mlflow ui --backend-store-uri sqlite:///outputs/mlflow.db

# End-to-end tests share a process, as they share results; the others run beside them, and are shown behind.
test: $(READY) check
	@export OMP_NUM_THREADS=1; \
	$(BIN)/python -m pytest -m "$(FAST) and not commands" > .venv/tests.log 2>&1 & others=$$!; \
	$(BIN)/python -m pytest -m "$(FAST) and commands"; status=$$?; \
	wait $$others || status=1; cat .venv/tests.log; exit $$status

test-slow: $(READY)
	@$(BIN)/python -m pytest -m slow

check: $(READY)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: $(PYTHON) is older than 3.11; set PYTHON=" >&2; exit 2; }
	@echo "setting up .venv (a few GB on the first run)" >&2
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check uv >&2
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --constraint constraints.txt --editable '.[offline,dev]' >&2
	@touch $(READY)

clean:
	rm -rf .venv outputs
