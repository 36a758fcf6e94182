# make demo    install, draw pictures, train, export, evaluate
# make test    install what the tests need and run all of them
# make check   linter, formatter, type checker, import directions
# make deploy-test   the runtime's tests without torch, on the oldest versions it claims
# make browser-test  the report's page in Chromium (Debian's packages chromium and chromium-driver)
# make triton-test   what --triton writes, on a real Triton Inference Server (without docker; Linux with glibc 2.35)

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check

.PHONY: demo test check deploy-test browser-test triton-test clean
.DEFAULT_GOAL := demo

$(VENV)/installed-toolkit: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "training and export need Python 3.11 or newer: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV): PyTorch is 5.5 GB, one to several minutes"
	$(PIP_INSTALL) -c constraints.txt -e '.[export,cpu]'
	@touch $@

$(VENV)/installed-dev: $(VENV)/installed-toolkit
	$(PIP_INSTALL) -c constraints.txt -e '.[export,cpu,dev]'
	@touch $@

demo: $(VENV)/installed-toolkit
	rm -rf demo/pictures demo/run demo/bundle demo/eval
	mkdir -p demo
	$(BIN)/siamese demo_data demo/pictures --train_classes 100 --val_classes 20 --drawings 12
	$(BIN)/siamese-train --train_path demo/pictures/train --val_path demo/pictures/val -o demo/run \
		--weights none --image_size 32 --pairing batch --no_flip -e 20
	$(BIN)/siamese-export --checkpoint demo/run/best.pth -o demo/bundle --val_path demo/pictures/val
	$(BIN)/siamese-eval -v demo/pictures/val -o demo/eval -c demo/bundle
	@$(BIN)/python -c 'import json; auc = json.load(open("demo/eval/metrics.json"))["roc_auc"]; assert auc >= 0.95, f"ROC AUC {auc:.3f}, expected at least 0.95"'
	@echo "report:        $(CURDIR)/demo/eval/report.html, metrics.json and pairs.csv"
	@echo "pair pictures: $(CURDIR)/demo/eval/0.png to $$(($$(ls demo/eval/*.png | wc -l) - 1)).png"

test: $(VENV)/installed-dev
	$(BIN)/pytest -m "not triton and not browser"

check: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy --python-version 3.10 -p siamese_deploy
	$(BIN)/lint-imports

deploy-test:
	$(PYTHON) -m venv $(VENV)-oldest
	$(VENV)-oldest/bin/pip install --quiet --disable-pip-version-check -c constraints-oldest.txt \
		-e '.[cpu,check]' hypothesis jsonschema onnx pytest scikit-learn
	$(VENV)-oldest/bin/pytest tests/deploy

browser-test: $(VENV)/installed-dev
	$(BIN)/pytest -m browser tests/deploy

# The server comes in a wheel of its own that wants an older NumPy than we do.
triton-test: $(VENV)/installed-dev
	$(PYTHON) -m venv $(VENV)-triton
	$(VENV)-triton/bin/pip install --quiet --disable-pip-version-check nvidia-pytriton==0.7.0 'numpy<2' onnxruntime
	SIAMESE_TRITON=$(VENV)-triton $(BIN)/pytest -m triton tests/export/test_triton.py

clean:
	rm -rf $(VENV) $(VENV)-oldest $(VENV)-triton demo
