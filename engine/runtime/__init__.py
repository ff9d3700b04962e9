"""What runs on the device: buckets, packing, the step functions, sampling, compilation, memory.

The problem: XLA runs fixed shapes, requests have none. The idea: few geometric buckets, every executable compiled
before the first request; all that persists between steps stays on the device, donated from step to step; one packed
int32 array goes to the device per step, one small array of sampled tokens comes back, one step late. The scheduler's
`StepPlan` comes in, `StepResult` goes out.

Deliberately not here: who is scheduled (`engine.scheduling`), what a model is (`models`).
"""
