# Two commands for a fresh machine: `make demo` and `make test`. Both work in .venv.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: demo test bench clean

$(BIN)/fastprior:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet .

demo: $(BIN)/fastprior  ## install, and score the demo's washers; heat maps in maps/
	$(BIN)/fastprior score examples/washers --map maps || test $$? -eq 1

test:  ## install with everything the tests need, and run them
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[test,train]'
	$(BIN)/python -m pytest -n 2 --dist loadfile

bench: $(BIN)/fastprior
	$(BIN)/fastprior bench --steps 1,2,3,5

clean:
	rm -rf $(VENV) maps build *.egg-info
