# make demo    set up, build the lab, drive real programs through the gateway
# make test    set up, run the whole test suite
# make bench   the benchmark table
# make dashboards    lab, agent and Prometheus to look at, until Ctrl-C
# make check   lint and types only
# make coverage    the suite, and which lines of the Python code it runs: half an hour
# make test-debian    the demo, and some tests, on Debian 12's own libraries, without a virtual environment
# make test-vm   what needs another kernel, VLANs, PPP, flowtables, cards of several queues: in a virtual machine, an hour
# make test-programs   the ALGs with telephones, players and games that are too big for make test: two minutes
# make fuzz      every ALG is told a million spoilt talks: an hour of one CPU, and more
# make fuzz-packets   a hundred million mutated packets through every program: up to an hour; PACKETS=1000000 for fewer
# make soak      reload, restart and kill the agent a thousand times under load: what is lost? ten minutes; MINUTES=60
#                goes round for an hour, with files by FTP and another WAN address each time
# make deb     build a Debian package into build/
# make test-fresh   the commands above and the package, in a Debian 12 of their own: minutes
# make conformance   write docs/conformance.md anew from the tests' marks, and docs/metrics.md from the list of metrics
VENV   := .venv
PYTHON := $(VENV)/bin/python
RUN    := $(VENV)/bin/xdpmasq

.PHONY: setup demo test coverage test-debian test-programs test-vm fuzz fuzz-packets soak bench dashboards check conformance deb test-fresh clean

setup: $(VENV)/ready

$(VENV)/ready: pyproject.toml tools/setup
	tools/setup $(VENV)
	@touch $@

demo: setup
	$(RUN) lab demo

test: setup
	@[ "$$(id -u)" = 0 ] || { echo "make test: most tests need root and would be skipped; run it as root" >&2; exit 1; }
	$(PYTHON) -m ruff check xdpmasq tests tools
	@# one worker more than CPUs: tests wait, too
	$(PYTHON) -m mypy & types=$$!; $(PYTHON) -m pytest -n $$(($$(nproc) + 1)) --dist loadgroup && wait $$types

# not part of `make test`, but of CI: what the Debian package runs on, which is older than what the others run on
DEBIAN := python3-bpfcc python3-numpy python3-prometheus-client python3-pyroute2 python3-rich python3-typer \
	python3-hypothesis python3-pytest python3-pytest-xdist python3-scapy
test-debian: setup
	dpkg -s $(DEBIAN) >/dev/null 2>&1 || { apt-get update -qq && \
		DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $(DEBIAN) >/dev/null; }
	@/usr/bin/python3 -c 'from importlib.metadata import version; print(*(f"{n} {version(n)}" for n in ("numpy", "prometheus-client", "pyroute2", "rich", "typer")))'
	/usr/bin/python3 -m xdpmasq lab demo --no-cpu
	@# what of numpy and pyroute2 differs most
	/usr/bin/python3 -m pytest -n $$(nproc) --dist loadgroup tests/netns/test_forwards.py tests/netns/test_netdev.py \
		tests/netns/test_pcp.py::test_natpmpc tests/netns/test_algs.py::test_ftp_client_inside tests/bpf/test_pinholes.py

bench: setup
	$(RUN) bench

dashboards: setup
	$(PYTHON) tools/dashboards.py

check: setup
	$(PYTHON) -m ruff check xdpmasq tests tools
	$(PYTHON) -m ruff format --check xdpmasq tests tools
	$(PYTHON) -m mypy

# the suite once more, with which lines of xdpmasq/ it runs: in tests, in commands, and in agents that are not killed
coverage: setup
	$(VENV)/bin/pip install -q 'coverage>=7.10'
	rm -rf build/coverage && mkdir -p build/coverage
	$(PYTHON) -m coverage run -m pytest -n $$(nproc) --dist loadgroup
	$(PYTHON) -m coverage combine -q
	$(PYTHON) -m coverage report --skip-covered --sort=cover --fail-under=90

# not part of `make test`: fetches the kernels of Debian 12 and of its backports once, and emulates a machine
test-vm: setup
	@# compiled here, and found in the cache there: an emulated machine takes minutes for it
	PYTHONPATH=. $(PYTHON) tests/vm/test_programs.py
	@# of Linux 6.1 what has been seen to pass there
	VM_SUITE=bookworm tests/vm/run $(PYTHON) -m pytest tests/vm/test_programs.py tests/vm/test_flowtable.py tests/vm/test_multiqueue.py
	tests/vm/run $(PYTHON) -m pytest tests/vm

# not part of `make test`: 90 MB of packages, and calls and films that last as long as they last
PROGRAMS := baresip-core kamailio ffmpeg gir1.2-gst-rtsp-server-1.0 gstreamer1.0-plugins-good python3-gi darkplaces-server qstat
test-programs: setup
	tools/setup $(VENV) $(PROGRAMS)
	$(PYTHON) -m pytest tests/programs

# not part of `make test`, which tells ten thousand; FUZZ="h323 or sip" chooses, INPUTS says how many
FUZZ   := test
INPUTS := 1000000
fuzz: setup
	XDPMASQ_ALG_INPUTS=$(INPUTS) $(PYTHON) -m pytest -v --durations=0 -k '($(FUZZ)) and no_wrong_pinhole' tests/unit/alg/test_alg_fuzz.py

PACKETS := 100000000
fuzz-packets: setup
	$(PYTHON) tests/bpf/fuzzing.py --packets $(PACKETS)

MINUTES := 0
soak: setup
	$(PYTHON) tools/soak.py --minutes $(MINUTES)

conformance: setup
	$(PYTHON) tools/conformance.py
	$(PYTHON) tools/metrics.py

deb:
	packaging/build-deb

# not part of `make test` either: FRESH="demo test" names parts, of those that tests/fresh/run tells of
test-fresh:
	tests/fresh/run $(FRESH)

clean:
	rm -rf $(VENV) build *.egg-info
