# Everything is installed in .venv inside this folder. Written for GNU make 3.81 (macOS) and newer, and any POSIX shell.

PY := .venv/bin/python
# Tried in this order; `make clean setup PYTHONS=/opt/python3.12/bin/python3` asks for one.
PYTHONS := python3.14 python3.13 python3.12 python3.11 python3 python
# The folders that are subpackages of pix2seq, mapped in pyproject.toml.
BESIDE := tokenizers train infer configs

# albumentations asks the registry for a newer release at every import unless told not to.
export NO_ALBUMENTATIONS_UPDATE := 1

.PHONY: help setup demo demo-train clicks serve test test-slow test-web mutants lint docs bench lock audit release-check \
	release-notes clean

help: ## list these commands
	@sed -n 's/^\([a-z-]*\):.* ## /\1: /p' Makefile | awk -F': ' '{ printf "make %-13s %s\n", $$1, $$2 }'

setup: .venv/ready ## install the package and all that it needs in .venv (the other commands do it too)
	@echo "The environment in .venv is ready"

demo: .venv/ready ## show the trained model on new images, on the CPU, in a minute or two; results in demo/
	.venv/bin/pix2seq demo --out demo

demo-train: .venv/ready ## train a detector on generated images and show it, on the CPU, in minutes; results in demo/
	.venv/bin/pix2seq demo --train --out demo

clicks: .venv/ready ## train a model that answers clicks, about an hour on one core; the result is runs/clicks-own
	[ -d runs/clicks-world ] || .venv/bin/pix2seq data shapes runs/clicks-world --train 24000 --val 500 --seed 1906
	.venv/bin/pix2seq train --config configs/prompted_shapes.yaml data=runs/clicks-world out=runs/clicks --resume auto
	answers=`.venv/bin/pix2seq data answers runs/clicks-world runs/clicks-answers --checkpoint runs/clicks \
		--task prompted --limit 3000` && .venv/bin/pix2seq train --config configs/prompted_shapes.yaml --resume auto \
		data=runs/clicks-world out=runs/clicks-own init=runs/clicks steps=2000 lr=3e-4 prompted.answers=$$answers

test: .venv/ready ## the fast tests, on all cores (at most 8)
	$(PY) -m pytest --numprocesses auto --maxprocesses 8 --dist worksteal

test-slow: .venv/ready ## the tests that train or convert something larger
	$(PY) -m pytest -m slow

test-web: .venv/ready ## the tests of pix2seq serve: HTTP under load, and the page in Chromium if it is installed
	$(PY) -m pytest -m "" tests/test_serve.py tests/test_serve_clicks.py tests/test_page.py tests/test_page_clicks.py \
	  tests/test_serve_search.py tests/test_page_search.py \
	  tests/test_transcript.py

serve: .venv/ready ## show the trained model on a web page at http://127.0.0.1:7860; CHECKPOINT=DIR shows another
	.venv/bin/pix2seq serve $(if $(CHECKPOINT),--checkpoint $(CHECKPOINT))

mutants: .venv/ready ## put faults into the code, one at a time, and count those that no test notices; MUTANTS="--draw 50"
	$(PY) benchmarks/mutants.py $(MUTANTS)

lint: .venv/ready ## ruff, its formatter, mypy, and the schemas of the files that GitHub reads
	$(PY) -m check_jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(PY) -m check_jsonschema --builtin-schema vendor.github-issue-forms .github/ISSUE_TEMPLATE/bug.yml .github/ISSUE_TEMPLATE/idea.yml
	$(PY) -m check_jsonschema --builtin-schema vendor.github-issue-config .github/ISSUE_TEMPLATE/config.yml
	$(PY) -m check_jsonschema --builtin-schema vendor.citation-file-format --default-filetype yaml CITATION.cff
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	@rm -rf .typecheck && mkdir -p .typecheck/pix2seq
	@for entry in pix2seq/* $(BESIDE); do \
		case $$entry in */__pycache__) ;; *) ln -s "../../$$entry" .typecheck/pix2seq/ || exit 1 ;; esac; \
	done
	@broken=`find -L .typecheck -type l`; \
	if [ -n "$$broken" ]; then echo "mypy would miss these broken links:" $$broken >&2; exit 1; fi
	@echo "mypy -p pix2seq (in .typecheck, a tree of links: mypy does not read the mapping in pyproject.toml)"; \
	report=`cd .typecheck && ../$(PY) -m mypy --config-file ../pyproject.toml --cache-dir ../.mypy_cache -p pix2seq 2>&1`; \
	status=$$?; \
	printf '%s\n' "$$report" | sed -E 's#^pix2seq/(tokenizers|train|infer|configs)/#\1/#'; \
	if [ $$status -ne 0 ]; then exit $$status; fi; \
	checked=`printf '%s\n' "$$report" | sed -n 's/^Success: .* in \([0-9]*\) source files*$$/\1/p'`; \
	expected=`find pix2seq $(BESIDE) -name '*.py' | wc -l`; \
	if [ "$${checked:-0}" -lt "$$expected" ]; then \
		echo "mypy checked $${checked:-0} files, but the package has" $$expected >&2; exit 1; \
	fi

docs: .venv/ready ## build the documentation site in site/, with warnings as errors
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict

bench: .venv/ready ## AP against minutes and images on the generated shapes, about 20 minutes
	$(PY) benchmarks/learning.py

lock: ## write requirements.txt, with hashes, from pyproject.toml; needs uv; LOCK=--upgrade moves every pin
	uv pip compile pyproject.toml --universal --python-version 3.11 --all-extras --generate-hashes --quiet $(LOCK) \
		--custom-compile-command 'make lock' --output-file requirements.txt

audit: .venv/ready ## licences of all packages, and known vulnerabilities of the locked ones; needs uv and the network
	$(PY) -m pytest -m "" tests/test_licences.py
	uvx pip-audit@2.10.1 --strict --requirement requirements.txt --require-hashes --disable-pip

release-check: .venv/ready ## version, change log, docs, cards, packages in a new environment; TAG=v0.1.0 the tag too
	$(PY) scripts/release.py check $(if $(TAG),--tag $(TAG))
	$(MAKE) docs

release-notes: .venv/ready ## print the notes of this version, from CHANGELOG.md
	@$(PY) scripts/release.py notes

clean: ## remove .venv, caches and build leftovers; keeps demo/ and runs/
	rm -rf .venv .typecheck .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist site pix2seq.egg-info
	find pix2seq $(BESIDE) tests benchmarks -type d -name __pycache__ -prune -exec rm -rf {} +

# The stamp holds this folder's path, because an environment stops working when its folder is moved or copied.
ifneq ($(shell cat .venv/ready 2>/dev/null),$(CURDIR))
.PHONY: .venv/ready
endif

.venv/ready: pyproject.toml requirements.txt
	@if uv --version >/dev/null 2>&1; then uv=yes; venv=sys; pip=sys; else uv=; venv='ensurepip, venv'; pip=pip; fi; \
	usable() { "$$1" -c "import sys, $$2; sys.exit(sys.version_info < (3, 11))" >/dev/null 2>&1; }; \
	if ! usable $(PY) "$$pip"; then \
		found=; \
		for python in $(PYTHONS); do \
			if usable "$$python" "$$venv"; then found=`"$$python" -c 'import sys; print(sys.executable)'`; break; fi; \
		done; \
		if [ -z "$$found" ] && [ -n "$$uv" ]; then \
			found=`uv python find --no-python-downloads '>=3.11' 2>/dev/null || true`; \
		fi; \
		if [ -z "$$found" ]; then \
			echo "Python 3.11 or newer with its venv module is needed; tried: $(PYTHONS). Install it (Debian, Ubuntu: python3-venv; macOS: python.org), then run make again." >&2; \
			exit 1; \
		fi; \
		echo "Setting up .venv with `"$$found" --version`; on Linux, PyTorch and its CUDA libraries are a download of several GB"; \
		if [ -n "$$uv" ]; then uv venv --quiet --no-project --clear --python "$$found" .venv; else "$$found" -m venv --clear .venv; fi || exit 1; \
	fi; \
	if [ -n "$$uv" ]; then install="uv pip install --compile-bytecode --python $(PY)"; \
	else install="$(PY) -m pip install --disable-pip-version-check"; fi; \
	$$install --require-hashes -r requirements.txt && $$install --no-deps --no-build-isolation -e . && pwd -P > .venv/ready
