"""Pure functions of tensors: cameras, actions, flow matching, rotary tables, keyed randomness."""
