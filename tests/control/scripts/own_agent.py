"""Runs a member of a job's own etcd until its standard input ends: ``own_agent.py ENDPOINT SECONDS``."""

import sys

from resilient_train.control.endpoint import OwnEtcd, parse
from resilient_train.control.own_etcd import member
from resilient_train.errors import ResilientError

own = parse("etcd", sys.argv[1], {})
assert isinstance(own, OwnEtcd)
try:
    with member(own, float(sys.argv[2])) as nearest:
        print("ready", nearest.members[0][1], flush=True)
        sys.stdin.read()
except ResilientError as error:
    print(type(error).__name__, error, flush=True)
