// The CUDA kernels of the compiled extension, for callers without CUDA headers. Shapes, dtypes and layout were
// checked by the caller; all addresses are on `device`. Nothing synchronises or allocates, so CUDA graphs can capture
// it. Throws std::runtime_error with CUDA's own message.
#pragma once

#include <string>

#include "step.h"

namespace cmai_fast::cuda {

using Address = std::uintptr_t;

// Doubles that a step asks for as `scratch`, other than pgd_linf_step without velocity, apgd_linf_step and
// random_start_linf, which need none; nor does the gated activation.
int64_t scratch_size(const Layout& layout);

// Whether one launch covers the whole batch, and 32-bit indices the channels of a row.
bool carries(const Layout& layout);

void pgd_linf_step(const PgdStep& args, Address scratch, int device, Address stream);
void pgd_l2_step(const PgdStep& args, Address scratch, int device, Address stream);
void apgd_linf_step(const ApgdStep& args, Address scratch, int device, Address stream);
void apgd_l2_step(const ApgdStep& args, Address scratch, int device, Address stream);
void random_start_linf(const RandomStart& args, Address scratch, int device, Address stream);
void random_start_l2(const RandomStart& args, Address scratch, int device, Address stream);
void gated_activation(const GatedActivation& args, void* out, Address scratch, int device, Address stream);
void gated_activation_backward(const GatedActivation& args, const void* grad, void* grad_x, void* grad_other,
                               Address scratch, int device, Address stream);

// Empty if a CUDA device can be used, or CUDA's reason why none can.
std::string no_device();

}  // namespace cmai_fast::cuda
