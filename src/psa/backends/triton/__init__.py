def device_reasons():
    return ["not here yet"]


def unsupported_reasons(q, k, v, selection):
    return device_reasons()
