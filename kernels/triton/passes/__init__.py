"""Passes over the streams, and the sums after them, that several operations share."""
