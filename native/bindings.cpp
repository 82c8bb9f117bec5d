// The native module `mooli._native`. Owns the mapping to Python and the checks of shapes; no arithmetic.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/unique_ptr.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <chrono>
#include <stdexcept>

#include "device.h"
#include "sampler.h"
#include "tape.h"

namespace nb = nanobind;
using namespace mooli;

namespace {

template <class T> using In = nb::ndarray<const T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Rows = nb::ndarray<const uint8_t, nb::ndim<2>, nb::device::cpu>;
using Floats = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Matrix = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

void check_rows(const Rows& rows, int format, int columns) {
  if (!known_format(format)) throw std::invalid_argument("unknown storage format");
  if (rows.stride(1) != 1 && rows.shape(1) > 1) throw std::invalid_argument("rows must be contiguous bytes");
  if (columns % block_values(Format(format)) != 0 || rows.shape(1) < row_bytes(Format(format), columns))
    throw std::invalid_argument("row length does not fit the storage format");
}

// `allowed` and `rows` of `n` rows of logits, or None and None.
using Words = nb::ndarray<const uint32_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
Masks masks_of(const Words& allowed, const In<int32_t>& rows, size_t n, int vocab) {
  if (!allowed.is_valid() || !rows.is_valid()) return {};
  if (rows.shape(0) < n || int64_t(allowed.shape(1)) * 32 < vocab) throw std::invalid_argument("masks of fewer rows or ids than are sampled");
  for (size_t i = 0; i < n; i++)
    if (rows.data()[i] >= int64_t(allowed.shape(0))) throw std::invalid_argument("a row of masks that there is not");
  return {allowed.data(), rows.data(), allowed.shape(1)};
}

void check_ragged(const In<int32_t>& indptr, size_t values) {
  for (size_t i = 0; i < indptr.shape(0); i++)
    if (indptr.data()[i] < 0 || size_t(indptr.data()[i]) > values || (i > 0 && indptr.data()[i] < indptr.data()[i - 1]))
      throw std::invalid_argument("an index pointer outside its values");
}

// float32 rows for activations and vectors; Python sees it as a NumPy array that keeps it alive
struct FloatBuffer {
  explicit FloatBuffer(size_t n) : count(n), buffer(n * 4 + 256) {}
  size_t count;
  Buffer buffer;
};

}  // namespace

NB_MODULE(_native, m) {
  m.def("available_isas", &available_isas);
  m.def("uniform", &uniform, nb::arg("seed"), nb::arg("position"));
  m.def("decode_rows", [](int format, Rows rows, int columns, nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu> out) {
    check_rows(rows, format, columns);
    if (out.shape(0) != rows.shape(0) || int(out.shape(1)) != columns) throw std::invalid_argument("output of another shape");
    for (size_t i = 0; i < rows.shape(0); i++)
      decode_row(Format(format), rows.data() + int64_t(i) * rows.stride(0), columns, out.data() + i * columns);
  });

  nb::class_<FloatBuffer>(m, "FloatBuffer")
      .def(nb::init<size_t>())
      .def_prop_ro("address", [](FloatBuffer& b) { return reinterpret_cast<uintptr_t>(b.buffer.data()); })
      .def("array", [](nb::handle self) {
        auto& b = nb::cast<FloatBuffer&>(self);
        return nb::ndarray<nb::numpy, float, nb::ndim<1>>(b.buffer.as<float>(), {b.count}, self);
      });

  nb::class_<Slabs>(m, "Slabs").def(nb::init<>());

  m.def("linear_bytes", [](int kind, int n, int k, bool gated, bool biased) {
    return Linear::bytes(kind, n, k, gated) + (biased ? size_t(Linear::panels(n, gated)) * kPanel * 4 : 0);
  });

  nb::class_<Linear>(m, "Linear")
      .def(nb::init<Slabs&, int, int, int, bool>(), nb::arg("memory"), nb::arg("kind"), nb::arg("n"), nb::arg("k"), nb::arg("gated") = false)
      .def_ro("n", &Linear::n)
      .def_ro("k", &Linear::k)
      .def_ro("gated", &Linear::gated)
      .def_prop_rw("gate", [](const Linear& w) { return int(w.gate); },
                   [](Linear& w, int gate) {
                     if (gate < 0 || gate >= kNumGates) throw std::invalid_argument("no such gate");
                     w.gate = Gate(gate);
                   })
      .def_prop_ro("kind", [](const Linear& w) { return int(w.kind); })
      .def_prop_ro("num_bytes", [](const Linear& w) { return w.data.size() + w.bias.size() * 4; })
      .def("set_bias", [](Linear& w, int part, int first, Floats bias) {
        if (part < 0 || part > (w.gated ? 1 : 0) || first < 0 || first + int(bias.shape(0)) > w.n)
          throw std::invalid_argument("bias outside the linear weight");
        if (w.bias.empty()) w.bias.assign(size_t(w.panels()) * kPanel, 0.f);
        for (int i = 0; i < int(bias.shape(0)); i++) {
          int p, column;
          w.locate(part, first + i, p, column);
          w.bias[size_t(p) * kPanel + column] = bias.data()[i];
        }
      })
      .def("unpack", [](const Linear& w, int part, nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu> out) {
        if (int(out.shape(0)) != w.n || int(out.shape(1)) != w.k) throw std::invalid_argument("output of another shape");
        for (int row = 0; row < w.n; row++) {
          int p, column;
          w.locate(part, row, p, column);
          unpack_column(w.kind, w.panel(p), w.k, column, out.data() + size_t(row) * w.k);
        }
      });

  nb::class_<Embedding>(m, "Embedding")
      .def(nb::init<const Linear&>(), nb::keep_alive<1, 2>())
      .def("__init__", [](Embedding* e, int format, int rows, int columns) {
        if (!known_format(format) || rows <= 0 || columns <= 0 || columns % block_values(Format(format)) != 0)
          throw std::invalid_argument("bad format or shape of a table");
        new (e) Embedding(Format(format), rows, columns);
      })
      .def_prop_ro("num_bytes", [](const Embedding& e) { return e.data.size(); });

  nb::class_<RopeTable>(m, "RopeTable");

  // weight: (channels, columns), as files have it
  nb::class_<ConvWeight>(m, "ConvWeight")
      .def("__init__", [](ConvWeight* w, Matrix weight, Floats bias) {
        const int channels = int(weight.shape(0)), columns = int(weight.shape(1));
        if (columns < 2 || columns > kMaxConvColumns || int(bias.shape(0)) != channels) throw std::invalid_argument("bad shape of a convolution");
        new (w) ConvWeight{columns, channels, std::vector<float>(weight.size()), std::vector<float>(bias.data(), bias.data() + channels)};
        for (int c = 0; c < channels; c++)
          for (int i = 0; i < columns; i++) w->weight[size_t(i) * channels + c] = weight.data()[size_t(c) * columns + i];
      })
      .def_ro("columns", &ConvWeight::columns)
      .def_ro("channels", &ConvWeight::channels)
      .def_prop_ro("num_bytes", [](const ConvWeight& w) { return (w.weight.size() + w.bias.size()) * 4; });
  nb::class_<Router>(m, "Router")
      .def("__init__", [](Router* r, Floats correction) {
        new (r) Router{std::vector<float>(correction.data(), correction.data() + correction.shape(0))};
      });
  nb::class_<RouteShape>(m, "RouteShape")
      .def("__init__", [](RouteShape* s, int num_experts, int slots, int score, int groups, int kept_groups, int group_top, bool normalise,
                          float eps, float minimum, float factor) {
        if (num_experts < 1 || num_experts > kMaxExperts || slots < 1 || slots > kMaxSlots || score < 0 || score > RouteShape::CHOSEN_SOFTMAX ||
            groups < 1 || num_experts % groups || kept_groups < 1 || kept_groups > groups || group_top < 1 || group_top > num_experts / groups ||
            slots > kept_groups * (num_experts / groups))
          throw std::invalid_argument("bad shape of a router");
        new (s) RouteShape{num_experts, slots, RouteShape::Score(score), groups, kept_groups, group_top, normalise, eps, minimum, factor};
      });
  // `gated` and `down`: lists of Linear, which an attribute of the object keeps
  nb::class_<Experts>(m, "Experts", nb::dynamic_attr())
      .def("__init__", [](Experts* e, const std::vector<const Linear*>& gated, const std::vector<const Linear*>& down) {
        if (gated.empty() || gated.size() != down.size() || gated.size() > size_t(kMaxExperts))
          throw std::invalid_argument("not two weights for each expert");
        for (size_t i = 0; i < gated.size(); i++)
          if (!gated[i] || !down[i] || !gated[i]->gated || down[i]->gated || gated[i]->n != down[i]->k || gated[i]->n != gated[0]->n ||
              gated[i]->k != gated[0]->k || down[i]->n != gated[0]->k)
            throw std::invalid_argument("experts of different shapes");
        new (e) Experts{gated, down};
      })
      .def_prop_ro("count", [](const Experts& e) { return e.down.size(); })
      .def_prop_ro("hidden", &Experts::hidden)
      .def_prop_ro("inner", &Experts::inner);
  nb::class_<DeltaWeight>(m, "DeltaWeight")
      .def("__init__", [](DeltaWeight* w, Floats decay, Floats dt_bias, std::optional<Floats> skip) {
        if (decay.shape(0) != dt_bias.shape(0) || (skip && skip->shape(0) != decay.shape(0)))
          throw std::invalid_argument("not a decay and a bias for each head");
        new (w) DeltaWeight{std::vector<float>(decay.data(), decay.data() + decay.shape(0)),
                            std::vector<float>(dt_bias.data(), dt_bias.data() + dt_bias.shape(0)), {}};
        if (skip) w->skip.assign(skip->data(), skip->data() + skip->shape(0));
      }, nb::arg("decay"), nb::arg("dt_bias"), nb::arg("skip") = nb::none())
      .def_prop_ro("num_bytes", [](const DeltaWeight& w) { return (w.decay.size() + w.dt_bias.size() + w.skip.size()) * 4; });
  nb::class_<DeltaShape>(m, "DeltaShape")
      .def("__init__", [](DeltaShape* s, int num_key_heads, int key_dim, int value_dim, std::vector<int> key_heads) {
        if (num_key_heads <= 0 || key_dim <= 0 || key_dim % 4 || value_dim <= 0 || value_dim % kDeltaColumns || key_heads.empty())
          throw std::invalid_argument("bad shape of a delta rule");
        for (int head : key_heads)
          if (head < 0 || head >= num_key_heads) throw std::invalid_argument("a head of keys that there is not");
        new (s) DeltaShape{num_key_heads, key_dim, value_dim, std::move(key_heads)};
      });

  // a weight of each head, which must live as long as this
  nb::class_<LatentWeight>(m, "LatentWeight")
      .def("__init__", [](LatentWeight* w, const std::vector<const Linear*>& keys, const std::vector<const Linear*>& values) {
        if (keys.empty() || keys.size() != values.size()) throw std::invalid_argument("not weights for keys and values of each head");
        for (size_t i = 0; i < keys.size(); i++) {
          for (const Linear* part : {keys[i], values[i]})
            if (!part || part->gated || !part->bias.empty()) throw std::invalid_argument("not a plain weight of a head");
          if (keys[i]->n != keys[0]->n || keys[i]->k != keys[0]->k || keys[i]->kind != keys[0]->kind || values[i]->n != values[0]->n ||
              values[i]->k != keys[0]->n || values[i]->kind != values[0]->kind)
            throw std::invalid_argument("weights of heads of different shapes or kinds");
        }
        new (w) LatentWeight{keys, values};
      }, nb::keep_alive<1, 2>(), nb::keep_alive<1, 3>());

  nb::class_<Device>(m, "Device")
      .def(nb::init<int, std::vector<int>, std::string>(), nb::arg("num_threads"), nb::arg("cpus"), nb::arg("isa"))
      .def_prop_ro("isa", [](const Device& d) { return std::string(d.kernels.name); })
      .def_prop_ro("has_bf16_dot", [](const Device& d) { return d.kernels.has_bf16_dot; })
      .def_prop_ro("num_threads", [](const Device& d) { return d.pool.size(); })
      .def_ro("num_begun_steps", &Device::num_begun_steps)
      .def("pin_caller", [](Device& d) { d.pool.pin_caller(); })
      // pack and fill return the number of a job. Until wait_packed has returned as much, the weight and the rows must live.
      .def("pack", [](Device& d, Linear& w, int part, int first_row, int format, Rows rows) {
        check_rows(rows, format, w.k);
        return d.packing.add([&d, &w, part, first_row, format, data = rows.data(), stride = size_t(rows.stride(0)), count = int(rows.shape(0))] {
          d.pack(w, part, first_row, Format(format), data, stride, count);
        });
      })
      .def("fill", [](Device& d, Embedding& table, Rows rows) {
        check_rows(rows, table.format, table.columns);
        if (table.head || int(rows.shape(0)) != table.rows) throw std::invalid_argument("rows of another table");
        return d.packing.add([&d, &table, data = rows.data(), stride = size_t(rows.stride(0))] { d.fill(table, data, stride); });
      })
      .def("wait_packed", [](Device& d, int64_t number) { return d.packing.wait(number); }, nb::call_guard<nb::gil_scoped_release>())
      .def("drop_packing", [](Device& d) { d.packing.drop(); }, nb::call_guard<nb::gil_scoped_release>())
      .def("add_rope", [](Device& d, In<double> inv_freq, double factor, double growth, int period) {
        if (period < 1) throw std::invalid_argument("a period of queries' temperatures below 1");
        d.ropes.push_back(std::make_unique<RopeTable>());
        d.ropes.back()->inv_freq.assign(inv_freq.data(), inv_freq.data() + inv_freq.shape(0));
        d.ropes.back()->factor = factor;
        d.ropes.back()->growth = growth;
        d.ropes.back()->period = period;
        return d.ropes.back().get();
      }, nb::rv_policy::reference_internal)
      .def("allocate_kv", &Device::allocate_kv, nb::call_guard<nb::gil_scoped_release>())
      .def("allocate_states", &Device::allocate_states, nb::call_guard<nb::gil_scoped_release>())
      .def("copy_state", &Device::copy_state, nb::call_guard<nb::gil_scoped_release>())
      .def("read_state", [](Device& d, int slot, nb::ndarray<uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu> out) {
        nb::gil_scoped_release release;
        d.read_state(slot, (char*)out.data(), out.shape(0));
      })
      .def("write_state", [](Device& d, int slot, In<uint8_t> data) {
        nb::gil_scoped_release release;
        d.write_state(slot, (const char*)data.data(), data.shape(0));
      })
      .def("plan_states", [](Device& d, In<int32_t> slots, In<int32_t> saves) {
        if (saves.shape(0) % 3) throw std::invalid_argument("states to keep are three numbers each");
        d.plan_states(slots.data(), int(slots.shape(0)), saves.data(), int(saves.shape(0) / 3));
      })
      .def_prop_ro("kv_bytes", [](const Device& d) { return d.kv.size(); })
      .def("allocate_experts", &Device::allocate_experts, nb::call_guard<nb::gil_scoped_release>())
      .def("allocate_scratch", &Device::allocate_scratch, nb::call_guard<nb::gil_scoped_release>())
      .def("settle", &Device::settle, nb::call_guard<nb::gil_scoped_release>())
      .def("release", &Device::release, nb::call_guard<nb::gil_scoped_release>())
      .def("copy_page", &Device::copy_page, nb::call_guard<nb::gil_scoped_release>())
      .def("read_pages", [](Device& d, In<int32_t> pages, int64_t tokens, nb::ndarray<uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu> out) {
        nb::gil_scoped_release release;
        d.read_pages(pages.data(), pages.shape(0), tokens, (char*)out.data(), out.shape(0));
      })
      .def("write_pages", [](Device& d, In<int32_t> pages, In<uint8_t> data) {
        nb::gil_scoped_release release;
        d.write_pages(pages.data(), pages.shape(0), (const char*)data.data(), data.shape(0));
      })
      .def_ro("num_pages", &Device::num_pages)
      // how keys and values lie in their tiles: see kernels.h
      .def_prop_ro("kv_layout", [](const Device& d) {
        constexpr const char* kNames[kNumKvTypes] = {"float32", "float16", "bfloat16", "bfloat16 panels", "int8"};
        std::string names;  // of the types that layers have, in their order
        for (const KvLayer& layer : d.kv_layers)
          if (names.find(kNames[layer.type]) == std::string::npos) names += (names.empty() ? "" : ", ") + std::string(kNames[layer.type]);
        return names;
      })
      .def("plan", [](Device& d, In<int32_t> ids, In<int32_t> positions, In<int32_t> rope_positions, In<int32_t> lengths,
                      nb::ndarray<const int32_t, nb::ndim<2>, nb::c_contig, nb::device::cpu> table, In<int32_t> asked, int vocab) {
        if (positions.shape(0) != ids.shape(0) || rope_positions.shape(0) != ids.shape(0) || table.shape(0) != lengths.shape(0)) throw std::invalid_argument("step arrays of different lengths");
        // The interpreter is kept: what waits for it has the whole step that follows, and would take longer than this does.
        d.plan(int(ids.shape(0)), ids.data(), positions.data(), rope_positions.data(), int(lengths.shape(0)), lengths.data(), table.data(),
               int(table.shape(1)), int(asked.shape(0)), asked.data(), vocab);
      })
      .def("sample", [](Device& d, Matrix logits, int vocab, Floats temperature, In<int32_t> top_k, Floats top_p, Floats min_p,
                        Floats frequency, Floats presence, Floats repetition, In<uint64_t> seeds, In<int64_t> positions,
                        In<int32_t> history, In<int32_t> history_indptr, In<int32_t> output_starts, In<int32_t> bias_ids,
                        Floats bias_values, In<int32_t> bias_indptr, Words allowed, In<int32_t> mask_rows, int first,
                        nb::ndarray<int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu> out) {
        int n = int(out.shape(0));
        if (n > int(logits.shape(0)) || vocab > int(logits.shape(1)) || first < 0 || first + n > int(temperature.shape(0)))
          throw std::invalid_argument("more rows to sample than logits or parameters");
        const size_t end = size_t(first + n);
        for (size_t length : {top_k.shape(0), top_p.shape(0), min_p.shape(0), frequency.shape(0), presence.shape(0), repetition.shape(0),
                              seeds.shape(0), positions.shape(0), output_starts.shape(0), history_indptr.shape(0) - 1,
                              bias_indptr.shape(0) - 1})
          if (length < end || length + 1 == 0) throw std::invalid_argument("sampling parameters of different lengths");
        check_ragged(history_indptr, history.shape(0));
        check_ragged(bias_indptr, std::min(bias_ids.shape(0), bias_values.shape(0)));
        const Masks masks = masks_of(allowed, mask_rows, end, vocab);
        nb::gil_scoped_release release;
        std::atomic<int> next{0};
        auto job = [&](int thread) {
          SamplerScratch& scratch = d.sampling[size_t(thread)];
          for (int i; (i = next.fetch_add(1)) < n;) {
            int s = first + i;
            int h0 = history_indptr.data()[s], b0 = bias_indptr.data()[s];
            SamplingRow row{temperature.data()[s], top_p.data()[s], min_p.data()[s], frequency.data()[s], presence.data()[s],
                            repetition.data()[s], top_k.data()[s], seeds.data()[s], positions.data()[s], history.data() + h0,
                            history_indptr.data()[s + 1] - h0, output_starts.data()[s], bias_ids.data() + b0,
                            bias_values.data() + b0, bias_indptr.data()[s + 1] - b0, masks.of(s)};
            out.data()[i] = sample_row(d.kernels, logits.data() + size_t(i) * logits.shape(1), vocab, row, scratch);
          }
        };
        if (n == 1) job(0); else d.pool.run(job);
      }, nb::arg("logits"), nb::arg("vocab"), nb::arg("temperature"), nb::arg("top_k"), nb::arg("top_p"), nb::arg("min_p"),
         nb::arg("frequency"), nb::arg("presence"), nb::arg("repetition"), nb::arg("seeds"), nb::arg("positions"),
         nb::arg("history"), nb::arg("history_indptr"), nb::arg("output_starts"), nb::arg("bias_ids"), nb::arg("bias_values"),
         nb::arg("bias_indptr"), nb::arg("allowed").none(), nb::arg("mask_rows").none(), nb::arg("first"), nb::arg("out"))
      // `allowed` and `mask_rows` may be None
      .def("logprobs", [](Device& d, Matrix logits, int row, int vocab, int target, int num_top, std::vector<int> ids, Words allowed,
                          In<int32_t> mask_rows) {
        if (row < 0 || row >= int(logits.shape(0)) || vocab > int(logits.shape(1))) throw std::invalid_argument("no such row of logits");
        const Masks masks = masks_of(allowed, mask_rows, size_t(row) + 1, vocab);
        LogprobRow r = logprob_row(d.kernels, logits.data() + size_t(row) * logits.shape(1), vocab, masks.of(row), target, num_top, ids, d.sampling[0]);
        return nb::make_tuple(r.logprob, r.top, r.chosen);
      }, nb::arg("logits"), nb::arg("row"), nb::arg("vocab"), nb::arg("target"), nb::arg("num_top"), nb::arg("ids"),
         nb::arg("allowed").none(), nb::arg("mask_rows").none())
      // tera-operations a second of the integer dot product, all threads; 7.37 G vector instructions a second is healthy on Zen 4
      .def("gauge_dots", [](Device& d, long iterations) {
        nb::gil_scoped_release release;
        std::vector<double> done(d.pool.size());
        double t = now();
        d.pool.run_on_all([&](int i) { done[i] = d.kernels.dot_gauge(iterations); });
        double total = 0;
        for (double x : done) total += x;
        return total / (now() - t);
      })
      // bytes a second read by all threads from a region of `bytes`, which should be far larger than the caches
      .def("gauge_read", [](Device& d, FloatBuffer& region) {
        nb::gil_scoped_release release;
        size_t n = size_t(d.pool.size()), part = region.count * 4 / n / 128 * 128;
        std::vector<long> sink(n);
        double t = now();
        d.pool.run_on_all([&](int i) { sink[i] = d.kernels.read_gauge(region.buffer.data() + part * i, part); });
        return double(part * n) / (now() - t);
      });

  nb::class_<Tape>(m, "Tape")
      .def(nb::init<Device&>(), nb::keep_alive<1, 2>())
      .def("__len__", &Tape::size)
      .def("embed", [](Tape& t, const Embedding& e, float scale, uintptr_t out) { t.embed(&e, scale, (float*)out); }, nb::keep_alive<1, 2>())
      .def("rms_norm", [](Tape& t, uintptr_t x, FloatBuffer& w, float eps, int width, uintptr_t residual, uintptr_t out) {
        if (size_t(width) != w.count) throw std::invalid_argument("norm weight of another width");
        t.rms_norm((const float*)x, w.buffer.as<float>(), eps, width, (const float*)residual, (float*)out);
      }, nb::keep_alive<1, 3>())
      // `norm` and `residual` may be None and 0
      .def("linear", [](Tape& t, uintptr_t x, const Linear& w, FloatBuffer* norm, float eps, uintptr_t residual, uintptr_t out) {
        if (norm && norm->count != size_t(w.k)) throw std::invalid_argument("norm weight of another width");
        t.linear((const float*)x, &w, norm ? norm->buffer.as<float>() : nullptr, eps, (const float*)residual, (float*)out);
      }, nb::arg("x"), nb::arg("weight"), nb::arg("norm").none(), nb::arg("eps"), nb::arg("residual"), nb::arg("out"),
         nb::keep_alive<1, 3>(), nb::keep_alive<1, 4>())
      .def("gated_linear_down", [](Tape& t, uintptr_t x, const Linear& gated, FloatBuffer* norm, float eps, const Linear& down,
                                   uintptr_t residual, uintptr_t out) {
        if (norm && norm->count != size_t(gated.k)) throw std::invalid_argument("norm weight of another width");
        if (!gated.gated || down.gated || gated.n != down.k || !is_integer(gated.kind) || !is_integer(down.kind))
          throw std::invalid_argument("not a gated weight and one that takes its outputs, both of integer kinds");
        t.gated_linear_down((const float*)x, &gated, norm ? norm->buffer.as<float>() : nullptr, eps, &down, (const float*)residual, (float*)out);
      }, nb::arg("x"), nb::arg("gated"), nb::arg("norm").none(), nb::arg("eps"), nb::arg("down"), nb::arg("residual"), nb::arg("out"),
         nb::keep_alive<1, 3>(), nb::keep_alive<1, 4>(), nb::keep_alive<1, 6>())
      .def("head_norm", [](Tape& t, uintptr_t x, FloatBuffer& q, FloatBuffer& k, float eps, int heads, int kv_heads, int head_dim, bool is_joint,
                           uintptr_t out) {
        if (q.count != size_t(is_joint ? heads : 1) * size_t(head_dim) || k.count != size_t(is_joint ? kv_heads : 1) * size_t(head_dim))
          throw std::invalid_argument("head norm weight of another width");
        t.head_norm((const float*)x, q.buffer.as<float>(), k.buffer.as<float>(), eps, heads, kv_heads, head_dim, is_joint, (float*)out);
      }, nb::keep_alive<1, 3>(), nb::keep_alive<1, 4>())
      .def("rope", [](Tape& t, uintptr_t x, RopeTable& r, int heads, int kv_heads, int head_dim, uintptr_t out) {
        if (r.inv_freq.size() * 2 > size_t(head_dim)) throw std::invalid_argument("rope table of another head size");
        t.rope((const float*)x, &r, heads, kv_heads, head_dim, (float*)out);
      })
      .def("attend", [](Tape& t, int layer, uintptr_t qkv, int heads, float scale, int window, float cap, FloatBuffer* sinks, uintptr_t out) {
        if (sinks && sinks->count != size_t(heads)) throw std::invalid_argument("sinks of another number of heads");
        t.attend(layer, (const float*)qkv, heads, scale, window, cap, sinks ? sinks->buffer.as<float>() : nullptr, (float*)out);
      }, nb::arg("layer"), nb::arg("qkv"), nb::arg("heads"), nb::arg("scale"), nb::arg("window"), nb::arg("cap"), nb::arg("sinks").none(), nb::arg("out"),
         nb::keep_alive<1, 8>())
      .def("attend_latent", [](Tape& t, int layer, uintptr_t q, uintptr_t latent, FloatBuffer& norm, float eps, const LatentWeight& up,
                               RopeTable& rope, int rope_dim, float scale, uintptr_t out) {
        const Linear &keys = *up.keys[0], &values = *up.values[0];
        if (norm.count != size_t(keys.n)) throw std::invalid_argument("norm weight of another width");
        if (rope_dim <= 0 || rope.inv_freq.size() * 2 != size_t(rope_dim)) throw std::invalid_argument("rope table of another head size");
        t.attend_latent(layer, (const float*)q, (const float*)latent, norm.buffer.as<float>(), eps, &up, &rope,
                        {int(up.keys.size()), keys.n, keys.k, rope_dim, values.n}, scale, (float*)out);
      }, nb::keep_alive<1, 5>(), nb::keep_alive<1, 7>())
      .def("conv", [](Tape& t, int layer, uintptr_t x, const ConvWeight& w, bool is_gated, uintptr_t out) {
        t.conv(layer, (const float*)x, &w, is_gated, (float*)out);
      }, nb::keep_alive<1, 4>())
      .def("delta_rule", [](Tape& t, int layer, uintptr_t qkv, uintptr_t gates, const DeltaWeight& w, const DeltaShape& shape, uintptr_t out) {
        if (w.decay.size() != shape.key_heads.size()) throw std::invalid_argument("decays of another number of heads");
        t.delta(layer, (const float*)qkv, (const float*)gates, &w, &shape, (float*)out);
      }, nb::keep_alive<1, 5>(), nb::keep_alive<1, 6>())
      .def("scan", [](Tape& t, int layer, uintptr_t qkv, uintptr_t gates, const DeltaWeight& w, const DeltaShape& shape, uintptr_t out) {
        if (w.skip.size() != shape.key_heads.size()) throw std::invalid_argument("a scan's weight of another number of heads");
        t.scan(layer, (const float*)qkv, (const float*)gates, &w, &shape, (float*)out);
      }, nb::keep_alive<1, 5>(), nb::keep_alive<1, 6>())
      .def("gated_norm", [](Tape& t, uintptr_t x, uintptr_t gate, FloatBuffer& w, float eps, int heads, int head_dim, uintptr_t out) {
        if (w.count != size_t(head_dim)) throw std::invalid_argument("head norm weight of another width");
        t.gated_norm((const float*)x, (const float*)gate, w.buffer.as<float>(), eps, heads, head_dim, (float*)out);
      }, nb::keep_alive<1, 4>())
      .def("soft_cap", [](Tape& t, uintptr_t x, float cap, int width, uintptr_t out) {
        t.soft_cap((const float*)x, cap, width, (float*)out);
      })
      .def("sigmoid_mul", [](Tape& t, uintptr_t x, uintptr_t gate, int width, bool is_one, uintptr_t out) {
        t.sigmoid_mul((const float*)x, (const float*)gate, width, is_one, (float*)out);
      })
      .def("silu_mul", [](Tape& t, uintptr_t x, uintptr_t gate, int width, uintptr_t out) {
        t.silu_mul((const float*)x, (const float*)gate, width, (float*)out);
      })
      .def("route", [](Tape& t, uintptr_t logits, const Router& router, const RouteShape& shape, uintptr_t out) {
        if (!router.correction.empty() && int(router.correction.size()) != shape.num_experts)
          throw std::invalid_argument("a correction of another number of experts");
        t.route((const float*)logits, &shape, &router.correction, (float*)out);
      }, nb::keep_alive<1, 3>(), nb::keep_alive<1, 4>())
      .def("experts", [](Tape& t, uintptr_t x, uintptr_t routing, int slots, const Experts& weight, uintptr_t residual, uintptr_t out) {
        if (slots < 1 || slots > kMaxSlots) throw std::invalid_argument("more experts of a row than there may be");
        t.experts((const float*)x, (const float*)routing, slots, &weight, (const float*)residual, (float*)out);
      }, nb::keep_alive<1, 5>())
      .def("asked_rows", [](Tape& t, uintptr_t x, int width, uintptr_t out) { t.asked_rows((const float*)x, width, (float*)out); })
      .def("run", &Tape::run, nb::call_guard<nb::gil_scoped_release>())
      .def("run_then", [](Tape& t, int rows, Tape& head, uintptr_t result, uintptr_t input, int width) {
        t.run_then(rows, head, (const float*)result, (float*)input, width);
      }, nb::call_guard<nb::gil_scoped_release>())
      .def("run_choosing", [](Tape& t, int rows, Tape& head, uintptr_t result, uintptr_t input, int width, int vocab, Words allowed,
                              In<int32_t> mask_rows, bool may_begin_next, nb::ndarray<int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu> out) {
        if (out.shape(0) != t.num_asked()) throw std::invalid_argument("not as many tokens as are asked for");
        const Masks masks = masks_of(allowed, mask_rows, out.shape(0), vocab);
        int32_t* ids = out.data();
        const int n = int(out.shape(0));
        nb::gil_scoped_release release;
        t.run_choosing(rows, head, (const float*)result, (float*)input, width, vocab, masks, ids);
        if (may_begin_next) t.begin_next(n, ids);
      }, nb::arg("rows"), nb::arg("head"), nb::arg("result"), nb::arg("input"), nb::arg("width"), nb::arg("vocab"),
         nb::arg("allowed").none(), nb::arg("mask_rows").none(), nb::arg("may_begin_next"), nb::arg("out"))
      .def("begin_next", [](Tape& t, In<int32_t> ids) { return t.begin_next(int(ids.shape(0)), ids.data()); })
      // (operation, seconds) for each entry of the tape
      .def("run_timed", [](Tape& t, int rows) {
        std::vector<double> seconds;
        { nb::gil_scoped_release release; seconds = t.run_timed(rows); }
        std::vector<std::pair<std::string, double>> out;
        for (size_t i = 0; i < seconds.size(); i++) out.emplace_back(Tape::name(t.code(i)), seconds[i]);
        return out;
      });
}
