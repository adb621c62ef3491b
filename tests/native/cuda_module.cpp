// The operators of csrc/binding/cuda.cpp for CPU tensors, in a separate namespace: the kernels run
// in the emulator, where device memory is host memory. Also settings and queries for tests.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "../../csrc/binding/cuda.h"
#include "../../csrc/binding/cuda_device.h"
#include "../../csrc/binding/schemas.h"
#include "../../csrc/cuda/launch.h"
#include "../emulator/settings.h"

namespace fused_xent::binding {

DeviceGuard::DeviceGuard(const torch::stable::Tensor&) {}
void* current_stream(const torch::stable::Tensor&) { return nullptr; }

STABLE_TORCH_LIBRARY(fused_xent_emulated, m) {
  define_operators(m);
  m.def(kForceCudaPlanSchema);
  m.def(kCudaDriverProblemSchema);
}
STABLE_TORCH_LIBRARY_IMPL(fused_xent_emulated, CPU, m) { implement_on_cuda(m); }
STABLE_TORCH_LIBRARY_IMPL(fused_xent_emulated, CompositeExplicitAutograd, m) {
  m.impl("force_cuda_plan", TORCH_BOX(&force_cuda_plan));
  m.impl("cuda_driver_problem", TORCH_BOX(&cuda_driver_problem));
}

namespace {

using cuda::Plan;

std::vector<int> members_of(const Plan& plan) {
  return {static_cast<int>(plan.regime),
          plan.threads,
          plan.team,
          plan.parts,
          plan.held,
          plan.workers,
          plan.row_vector,
          plan.max_groups};
}

std::vector<int> plan_for(const std::string& operation, const cuda::Shape& shape,
                          const cuda::Device& device) {
  if (operation == "forward") return members_of(cuda::plan_forward(shape, device));
  if (operation == "backward") return members_of(cuda::plan_backward(shape, device));
  return members_of(cuda::plan_forward_backward(shape, device));
}

const char* why_not(const std::vector<int>& m, const cuda::Shape& shape,
                    const cuda::Device& device) {
  const Plan plan{static_cast<cuda::Regime>(m[0]), m[1], m[2], m[3], m[4], m[5], m[6], m[7]};
  return cuda::why_not(plan, shape, device);
}

void set(const std::string& name, const std::string& value) {
  if (emulator_set(name.c_str(), value.c_str()) != 0) {
    throw std::invalid_argument("the emulator has no setting " + name + " = " + value);
  }
}

cuda::Device current_device() {
  cuda::Device device{};
  if (cuda::describe_device(&device) != cudaSuccess) throw std::runtime_error("no device");
  return device;
}

}  // namespace

PYBIND11_MODULE(emulated_cuda, m) {
  pybind11::class_<cuda::Shape>(m, "Shape")
      .def(pybind11::init([](int64_t n_rows, int64_t vocab_size, int element_size,
                             bool adjacent_classes, bool adjacent_rows, bool general, bool spread,
                             bool packed, bool scaled, bool capped) {
             return cuda::Shape{n_rows,  vocab_size, element_size, adjacent_classes, adjacent_rows,
                                general, spread,     packed,       scaled,           capped};
           }),
           pybind11::arg("n_rows"), pybind11::arg("vocab_size"), pybind11::arg("element_size"),
           pybind11::arg("adjacent_classes") = true, pybind11::arg("adjacent_rows") = false,
           pybind11::arg("general") = false, pybind11::arg("spread") = false,
           pybind11::arg("packed") = false, pybind11::arg("scaled") = false,
           pybind11::arg("capped") = false);
  pybind11::class_<cuda::Device>(m, "Device")
      .def(pybind11::init<int, int, int>(), pybind11::arg("capability"), pybind11::arg("sm_count"),
           pybind11::arg("shared_bytes"))
      .def_readonly("capability", &cuda::Device::capability)
      .def_readonly("sm_count", &cuda::Device::sm_count)
      .def_readonly("shared_bytes", &cuda::Device::shared_bytes);
  m.def("plan_for", &plan_for);
  m.def("why_not", &why_not);
  m.def("current_device", &current_device);
  m.def("set", &set);
  m.def("narrow_accesses", &emulator_narrow_accesses);
  m.def("error", [] { return std::string(emulator_error()); });
  m.def("launches", [] { return std::string(emulator_launches()); });
}

}  // namespace fused_xent::binding
