# Needs Python >= 3.11 and make, nothing else: .venv is made when missing, and again installed into when
# pyproject.toml has changed.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: demo test lint sweep clean

demo: $(READY)
	$(BIN)/python demo.py

# Twice what computes: once by the plain torch that remains where there is no compiler, and then all with the kernels.
test: lint
	DITAC_DISABLE_KERNELS=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 tests/test_ops.py tests/test_activation.py
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not sweep" -n 2 --dist loadfile

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

sweep: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m sweep -n 2 --dist worksteal

clean:
	rm -rf .venv .mypy_cache .ruff_cache build *.egg-info

$(READY): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python >= 3.11 is needed; choose one with: make PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[demo,plot,dev]"
	touch $@
