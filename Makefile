# make demo    install, draw pictures, train, export, evaluate
# make test    install what the tests need and run all of them
# make check   linter, formatter, type checker, import directions, bandit
# make deploy-test   the runtime's tests without torch, on the oldest versions it claims
# make browser-test  the report's page in Chromium (Debian's packages chromium and chromium-driver)
# make triton-test   what --triton writes, on a real Triton Inference Server (without docker; Linux with glibc 2.35)
# make bench   what benchmarks/ promise, about an hour on two idle cores; CHECKPOINT=FILE.pth, trained at 224 px, for the
#              accuracies too. Not in it, because they take hours: benchmarks/training.py and benchmarks/export.py
# make lock    requirements/*.txt, the exact packages with their hashes, and sbom/*.cdx.json, anew from constraints.txt

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check

.PHONY: demo test check deploy-test browser-test triton-test bench lock clean
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

$(VENV)/installed-bench: $(VENV)/installed-toolkit
	$(PIP_INSTALL) -c constraints.txt -e '.[export,cpu,bench]'
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
	$(BIN)/pytest -n auto --dist loadfile -m "not triton and not browser"

check: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy --python-version 3.10 -p siamese_deploy
	$(BIN)/lint-imports
	$(BIN)/bandit --quiet -c pyproject.toml -r siamese_deploy siamese_train export

deploy-test:
	$(PYTHON) -m venv $(VENV)-oldest
	$(VENV)-oldest/bin/pip install --quiet --disable-pip-version-check -c constraints-oldest.txt \
		-e '.[cpu,check,sign]' hypothesis jsonschema onnx pytest pytest-xdist scikit-learn
	$(VENV)-oldest/bin/pytest -n auto --dist loadfile tests/deploy

browser-test: $(VENV)/installed-dev
	$(BIN)/pytest -m browser tests/deploy

# The server comes in a wheel of its own that wants an older NumPy than we do.
triton-test: $(VENV)/installed-dev
	$(PYTHON) -m venv $(VENV)-triton
	$(VENV)-triton/bin/pip install --quiet --disable-pip-version-check nvidia-pytriton==0.7.0 'numpy<2' onnxruntime
	SIAMESE_TRITON=$(VENV)-triton $(BIN)/pytest -m triton tests/export/test_triton.py

# One after the other, since what is timed wants the machine for itself; the rest runs on after a promise is not kept.
bench: CHECKPOINT_OPTION := $(if $(CHECKPOINT),--checkpoint $(CHECKPOINT))
bench: $(VENV)/installed-bench
	@failed=; run() { echo "== $$*"; $(BIN)/python benchmarks/"$$@" || failed="$$failed, $$*"; }; \
	run evaluation.py; run runtime.py; run network.py $(CHECKPOINT_OPTION); run decoding.py; \
	run whole.py pictures $(CHECKPOINT_OPTION); run whole.py none; run whole.py help; run whole.py memory; \
	run search.py; run gate.py; run scaling.py; \
	test -z "$$failed" || { echo "not kept or failed: $${failed#, }"; exit 1; }

LOCK = $(VENV)-lock/bin/uv pip compile --quiet --upgrade --universal --generate-hashes -c constraints.txt \
	--custom-compile-command "make lock" pyproject.toml
BOM = $(VENV)-lock/bin/cyclonedx-py requirements --pyproject pyproject.toml --mc-type application --output-reproducible
# Its descriptions repeat the lines of the lock file, hashes and all.
SHORTEN = $(VENV)-lock/bin/python -c 'import json, sys; \
	bom = json.load(open(sys.argv[1])); [part.pop("description") for part in bom["components"]]; \
	open(sys.argv[1], "w").write(json.dumps(bom, indent=1, sort_keys=True) + "\n")'

lock:
	$(PYTHON) -m venv $(VENV)-lock
	$(VENV)-lock/bin/pip install --quiet --disable-pip-version-check uv==0.13.9 cyclonedx-bom==7.5.0
	mkdir -p requirements sbom
	$(LOCK) --python-version 3.10 --extra cpu --extra sign -o requirements/edge.txt
	$(LOCK) --python-version 3.11 --extra export --extra cpu --extra sign -o requirements/train.txt
	$(BOM) requirements/edge.txt -o sbom/edge.cdx.json
	$(BOM) requirements/train.txt -o sbom/train.cdx.json
	$(SHORTEN) sbom/edge.cdx.json
	$(SHORTEN) sbom/train.cdx.json

clean:
	rm -rf $(VENV) $(VENV)-oldest $(VENV)-triton $(VENV)-lock demo
