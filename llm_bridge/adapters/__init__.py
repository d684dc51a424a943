"""The estimators inside other trainers. How-tos, run line by line: `HOWTO_TRL.md`, `HOWTO_VERL.md`.

    trl     `VcpoTrainer`: TRL's GRPOTrainer with lag, any estimator, the ESS brake and the gauges
    verl    every estimator as `algorithm.adv_estimator`, loaded as an external module
    rows    what they share: an estimator's coefficients for rows that a framework hands over in any order
    lag     the queue that makes data stale

`README.md` (generated) says which option of TRL and verl is which entry of the catalogue; `OTHERS.md`, where an
estimator plugs into OpenRLHF, prime-rl, slime, SkyRL and AReaL (read, not run). TRL and verl need an environment each.
"""
