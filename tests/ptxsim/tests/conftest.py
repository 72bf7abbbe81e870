from ptxsim.fixtures import simulated_device  # noqa: F401
