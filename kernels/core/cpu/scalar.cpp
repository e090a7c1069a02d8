// Portable C++: what runs where nothing better is built, and what the other sources are compared with.
#include "portable.h"

namespace {

bool supported() { return true; }

int linear(const Problem &p) { return portable_linear(p, decode_levels); }

const Isa ISA = {"scalar", supported, linear};

}  // namespace

extern "C" const Isa *hfq_scalar() { return &ISA; }
