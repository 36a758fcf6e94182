"""`siamese bench`: latency and throughput of verifiers on real pictures; docs/bench.md.

timing       one query again and again: warm-up, windows, percentiles
scenarios    what a query is: a pair, eight pairs, a batch, cached embeddings, a gallery
run          contenders -> rows                 bundles      a bundle on each provider is a contender
machine      what the figures depend on
tables       rows -> text, JSON, Markdown       chart        rows -> picture
regression   rows against an earlier bench.json
"""

from siamese_deploy.bench.bundles import bundle_contenders
from siamese_deploy.bench.run import Contender, Row, Settings, run_benchmark

__all__ = ["Contender", "Row", "Settings", "bundle_contenders", "run_benchmark"]
