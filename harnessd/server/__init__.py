"""The replaceable process: policy, history and the one stateful object, the supervisor."""
