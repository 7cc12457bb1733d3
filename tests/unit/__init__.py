"""Tests of single units: the batcher, the scheduler, admission, the codecs and the timings, without a server."""
