"""Does a server keep its promises for as long as it runs? Mixed load with random aborts, and what it leaves behind.

    python -m benchmarks.soak --minutes 20

starts `quire serve`, sends it every kind of request that it has (`traffic`), drops some of them midway, samples memory
and metrics (`watch`), and says whether anything was lost or leaked (`report`). Not a measurement of speed.
"""
