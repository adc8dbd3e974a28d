#include "cuda_driver.h"

#include <map>
#include <memory>
#include <mutex>

#include "library.h"
#include "refuse.h"

namespace vimdeploy {
namespace {

// As cuda.h declares them: a CUdevice is an int, a CUdeviceptr 64 bits, contexts and streams are pointers. The names
// with _v2 are what cuda.h's macros make of those without.
using Status = int;
using Pointer = std::uint64_t;

struct Driver {
  Status (*Init)(unsigned);
  Status (*GetErrorString)(Status, const char**);
  Status (*DeviceGetCount)(int*);
  Status (*DeviceGet)(int*, int);
  Status (*DeviceGetName)(char*, int, int);
  Status (*DeviceGetAttribute)(int*, int, int);
  Status (*DevicePrimaryCtxRetain)(void**, int);
  Status (*CtxPushCurrent)(void*);
  Status (*CtxPopCurrent)(void**);
  Status (*MemAlloc)(Pointer*, std::size_t);
  Status (*MemFree)(Pointer);
  Status (*StreamCreate)(void**, unsigned);
  Status (*StreamDestroy)(void*);
  Status (*StreamSynchronize)(void*);
  Status (*MemcpyHtoDAsync)(Pointer, const void*, std::size_t, void*);
  Status (*MemcpyDtoHAsync)(void*, Pointer, std::size_t, void*);
  Status (*StreamBeginCapture)(void*, int);
  Status (*StreamEndCapture)(void*, void**);
  Status (*GraphInstantiate)(void**, void*, unsigned long long);
  Status (*GraphLaunch)(void*, void*);
  Status (*GraphDestroy)(void*);
  Status (*GraphExecDestroy)(void*);
};

constexpr unsigned kStreamNonBlocking = 1;
constexpr int kCaptureThreadLocal = 1;  // other threads of the program may allocate meanwhile
constexpr int kComputeCapabilityMajor = 75;
constexpr int kComputeCapabilityMinor = 76;
constexpr const char* kNoGraph = "open the plan without OpenOptions::cuda_graph";
constexpr const char* kNoDriver = "run on a host with an NVIDIA GPU and its driver, or open the .onnx file";

template <typename Function>
void Bind(const Library& library, const char* symbol, Function** function) {
  *function = reinterpret_cast<Function*>(library.Symbol(symbol));
  if (*function == nullptr) RefuseMissing("the NVIDIA driver has no " + std::string(symbol), "update the driver");
}

void Check(const Driver& driver, Status status, const std::string& doing, const std::string& hint) {
  if (status == 0) return;
  const char* text = nullptr;
  driver.GetErrorString(status, &text);
  RefuseMissing(doing + ": " + (text != nullptr ? text : "CUDA error " + std::to_string(status)), hint);
}

const Driver& GetDriver() {
  static const Driver* const driver = [] {
    const Library library = LoadLibrary({"the NVIDIA driver", "", nullptr, {"libcuda.so.1"}, kNoDriver});
    auto bound = std::make_unique<Driver>();
    Bind(library, "cuInit", &bound->Init);
    Bind(library, "cuGetErrorString", &bound->GetErrorString);
    Bind(library, "cuDeviceGetCount", &bound->DeviceGetCount);
    Bind(library, "cuDeviceGet", &bound->DeviceGet);
    Bind(library, "cuDeviceGetName", &bound->DeviceGetName);
    Bind(library, "cuDeviceGetAttribute", &bound->DeviceGetAttribute);
    Bind(library, "cuDevicePrimaryCtxRetain", &bound->DevicePrimaryCtxRetain);
    Bind(library, "cuCtxPushCurrent_v2", &bound->CtxPushCurrent);
    Bind(library, "cuCtxPopCurrent_v2", &bound->CtxPopCurrent);
    Bind(library, "cuMemAlloc_v2", &bound->MemAlloc);
    Bind(library, "cuMemFree_v2", &bound->MemFree);
    Bind(library, "cuStreamCreate", &bound->StreamCreate);
    Bind(library, "cuStreamDestroy_v2", &bound->StreamDestroy);
    Bind(library, "cuStreamSynchronize", &bound->StreamSynchronize);
    Bind(library, "cuMemcpyHtoDAsync_v2", &bound->MemcpyHtoDAsync);
    Bind(library, "cuMemcpyDtoHAsync_v2", &bound->MemcpyDtoHAsync);
    Bind(library, "cuStreamBeginCapture_v2", &bound->StreamBeginCapture);
    Bind(library, "cuStreamEndCapture", &bound->StreamEndCapture);
    Bind(library, "cuGraphInstantiateWithFlags", &bound->GraphInstantiate);
    Bind(library, "cuGraphLaunch", &bound->GraphLaunch);
    Bind(library, "cuGraphDestroy", &bound->GraphDestroy);
    Bind(library, "cuGraphExecDestroy", &bound->GraphExecDestroy);
    Check(*bound, bound->Init(0), "CUDA does not start", kNoDriver);
    return bound.release();
  }();
  return *driver;
}

Pointer ToPointer(const void* memory) { return reinterpret_cast<Pointer>(memory); }

}  // namespace

const CudaDevice& CudaDevice::Get(int id) {
  static std::mutex mutex;
  static auto* const devices = new std::map<int, std::unique_ptr<const CudaDevice>>;
  const std::lock_guard<std::mutex> lock(mutex);
  auto& device = (*devices)[id];
  if (device == nullptr) device.reset(new CudaDevice(id));
  return *device;
}

CudaDevice::CudaDevice(int id) : id_(id) {
  const Driver& driver = GetDriver();
  int count = 0;
  Check(driver, driver.DeviceGetCount(&count), "CUDA finds no device", kNoDriver);
  if (id < 0 || id >= count) {
    RefuseMissing("there is no CUDA device " + std::to_string(id) + ": this host has " + std::to_string(count),
                  "name another device_id, or look at CUDA_VISIBLE_DEVICES");
  }
  int handle = 0;
  int major = 0;
  int minor = 0;
  char name[256] = "";
  const std::string doing = "CUDA device " + std::to_string(id) + " cannot be used";
  Check(driver, driver.DeviceGet(&handle, id), doing, kNoDriver);
  Check(driver, driver.DeviceGetName(name, sizeof name, handle), doing, kNoDriver);
  Check(driver, driver.DeviceGetAttribute(&major, kComputeCapabilityMajor, handle), doing, kNoDriver);
  Check(driver, driver.DeviceGetAttribute(&minor, kComputeCapabilityMinor, handle), doing, kNoDriver);
  Check(driver, driver.DevicePrimaryCtxRetain(&context_, handle), doing, "see whether another program holds it");
  sm_ = 10 * major + minor;
  name_ = name;
}

void* CudaDevice::Allocate(std::size_t bytes) const {
  Pointer memory = 0;
  Check(GetDriver(), GetDriver().MemAlloc(&memory, bytes),
        name_ + " has no " + std::to_string(bytes) + " bytes to give", "take a smaller batch or fewer contexts");
  return reinterpret_cast<void*>(memory);
}

void CudaDevice::Free(void* memory) const noexcept { GetDriver().MemFree(ToPointer(memory)); }

void* CudaDevice::NewStream() const {
  void* stream = nullptr;
  Check(GetDriver(), GetDriver().StreamCreate(&stream, kStreamNonBlocking), name_ + " gives no stream",
        "close some contexts");
  return stream;
}

void CudaDevice::DestroyStream(void* stream) const noexcept { GetDriver().StreamDestroy(stream); }

void CudaDevice::CopyIn(void* to, const void* from, std::size_t bytes, void* stream) const {
  Check(GetDriver(), GetDriver().MemcpyHtoDAsync(ToPointer(to), from, bytes, stream),
        "images cannot be copied to " + name_, "restart the program: an earlier error has spoilt the device");
}

void CudaDevice::CopyOut(void* to, const void* from, std::size_t bytes, void* stream) const {
  Check(GetDriver(), GetDriver().MemcpyDtoHAsync(to, ToPointer(from), bytes, stream),
        "outputs cannot be copied from " + name_, "restart the program: an earlier error has spoilt the device");
}

void CudaDevice::Synchronize(void* stream) const {
  Check(GetDriver(), GetDriver().StreamSynchronize(stream), "the model did not run to its end on " + name_,
        "restart the program, and check the plan with `vimdeploy verify parity`");
}

void CudaDevice::BeginCapture(void* stream) const {
  Check(GetDriver(), GetDriver().StreamBeginCapture(stream, kCaptureThreadLocal), "nothing can be recorded on " + name_,
        kNoGraph);
}

void* CudaDevice::EndCapture(void* stream) const {
  const Driver& driver = GetDriver();
  void* graph = nullptr;
  void* executable = nullptr;
  Check(driver, driver.StreamEndCapture(stream, &graph), "the model's work cannot be recorded on " + name_, kNoGraph);
  const Status status = driver.GraphInstantiate(&executable, graph, 0);
  driver.GraphDestroy(graph);
  Check(driver, status, "the recorded work cannot be made ready on " + name_, kNoGraph);
  return executable;
}

void CudaDevice::AbandonCapture(void* stream) const noexcept {
  void* graph = nullptr;
  if (GetDriver().StreamEndCapture(stream, &graph) == 0 && graph != nullptr) GetDriver().GraphDestroy(graph);
}

void CudaDevice::Launch(void* graph, void* stream) const {
  Check(GetDriver(), GetDriver().GraphLaunch(graph, stream), "the recorded work cannot be started on " + name_,
        "restart the program: an earlier error has spoilt the device");
}

void CudaDevice::DestroyGraph(void* graph) const noexcept { GetDriver().GraphExecDestroy(graph); }

CudaDevice::Active::Active(const CudaDevice& device) {
  Check(GetDriver(), GetDriver().CtxPushCurrent(device.context_), device.name_ + " cannot be made current",
        "restart the program: an earlier error has spoilt the device");
}

CudaDevice::Active::~Active() {
  void* context = nullptr;
  GetDriver().CtxPopCurrent(&context);
}

}  // namespace vimdeploy
