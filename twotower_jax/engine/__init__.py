"""Many requests at once, each row at its own pace.

Rows live in `slots`; prompts are read into a `bench` of rows beside them, from which a slot that falls empty is filled
on the devices, without the host. The host starts programs ahead of the devices and sees what rows wrote one round late.
"""
