"""For tests: conformance suites for those who write a control store or a tier, and real jobs to kill things in."""
