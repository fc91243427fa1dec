# Two commands are all a fresh machine needs: `make demo` and `make test`. Each makes .venv and installs into it.
VENV := .venv
PYTHON := $(VENV)/bin/python
STAMP := $(VENV)/.installed

.PHONY: demo test lint sanitize soak chaos bench clean

demo: $(STAMP)
	$(PYTHON) examples/demo.py

test: $(STAMP) lint
	$(PYTHON) -m pytest -n 2 --dist worksteal

lint: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/mypy --config-file benchmarks/mypy.ini benchmarks/

# The native engine under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer; its device half on a fake driver.
DEVICE := csrc/context.cpp csrc/device.cpp csrc/download.cpp csrc/driver.cpp csrc/fingerprints.cpp csrc/upload.cpp
SANITIZE = $(CXX) -std=c++20 -O1 -g -Wall -Wextra -Werror -Wno-error=tsan -fno-omit-frame-pointer -pthread
sanitize:
	mkdir -p build
	for kind in address,undefined thread; do \
	  $(SANITIZE) -fsanitize=$$kind csrc/tests/sanitize.cpp csrc/copier.cpp csrc/crc32c.cpp csrc/file.cpp csrc/gather.cpp csrc/parity.cpp \
	    csrc/publish.cpp csrc/scatter.cpp $(DEVICE) -ldl -o build/sanitize && \
	  $(SANITIZE) -fsanitize=$$kind -shared -fPIC tests/image/fake_cuda.cpp -o build/libcuda_fake.so && \
	  $(SANITIZE) -fsanitize=$$kind csrc/tests/sanitize_cuda.cpp csrc/copier.cpp csrc/crc32c.cpp $(DEVICE) \
	    build/libcuda_fake.so -Wl,-rpath,$(CURDIR)/build -ldl -o build/sanitize_cuda && \
	  echo "$$kind:" && build/sanitize && build/sanitize_cuda build/libcuda_fake.so || exit 1; \
	done

# 10,000 simulated clusters (ten to twenty minutes); 200 kills while states are being saved; 10,000 damaged checkpoints,
# each restored: a few minutes each.
soak: $(STAMP)
	$(PYTHON) -m resilient_train.sim --seeds 10000
	$(PYTHON) -u tests/multiprocess/test_killed_while_saving.py 200
	$(PYTHON) tests/storage/test_corruption.py 10000
	$(PYTHON) -m pytest -n 2 --dist worksteal -m soak

# Random faults of nineteen kinds on jobs of three nodes over a real etcd; the seed is printed.  make chaos FAULTS=200 SEED=1
FAULTS := 30
SEED :=
chaos: $(STAMP)
	PYTHONPATH=tests/multiprocess:tests/control $(PYTHON) -u tests/multiprocess/chaos.py $(FAULTS) $(SEED)

bench: $(STAMP)
	$(PYTHON) benchmarks/bench_recovery.py
	$(PYTHON) benchmarks/bench_nodes.py

# torch comes first and stays pinned: the CPU build is enough here, and a newer one would bring gigabytes of CUDA.
$(STAMP): pyproject.toml CMakeLists.txt $(wildcard csrc/*) requirements-dev.txt
	test -x $(PYTHON) || python3 -m venv $(VENV)
	$(PYTHON) -m pip install --quiet --disable-pip-version-check "$$(grep '^torch==' requirements-dev.txt)"
	$(PYTHON) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	$(PYTHON) -m pip install --quiet --disable-pip-version-check --no-build-isolation \
	  --constraint requirements-dev.txt --editable ".[demo,dev]"
	touch $(STAMP)

clean:
	rm -rf $(VENV) build demo .pytest_cache .mypy_cache .ruff_cache .hypothesis
