"""`siamese bench`: latency and throughput of bundles on real pictures; docs/bench.md.

timing       one query again and again: warm-up, windows, percentiles
scenarios    what a query is: a pair, eight pairs, a batch, cached embeddings, a gallery
run          bundles x providers -> rows        machine      what the figures depend on
tables       rows -> text, JSON, Markdown       chart        rows -> picture
regression   rows against an earlier bench.json
"""

from siamese_deploy.bench.run import Row, Settings, run_benchmark

__all__ = ["Row", "Settings", "run_benchmark"]
