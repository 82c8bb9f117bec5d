// All words of the page, in English and Chinese.

import { kept } from "./dom.js";

const settings = kept("localStorage");

export const WORDS = {
  // the bar
  skip: ["Skip to content", "跳到内容"],
  views: ["Views", "视图"],
  chat: ["Chat", "对话"],
  tree: ["Tree", "缓存树"],
  now: ["Now", "现状"],
  api: ["API", "接口"],
  theme: ["Colours", "配色"],
  theme_auto: ["Auto", "自动"],
  theme_light: ["Light", "浅色"],
  theme_dark: ["Dark", "深色"],
  forget_key: ["Forget key", "清除密钥"],
  key: ["API key", "API 密钥"],
  key_title: ["This server wants a key", "此服务器需要密钥"],
  key_text: ["It is the one that was given to the server, or that its operator gave you.", "即启动服务器时设定的密钥，或运营者给您的密钥。"],
  key_hint: ["Kept by this tab alone, until it is closed.", "仅保存在此标签页中，关闭即失效。"],
  key_wrong: ["The server does not take this key.", "服务器不接受此密钥。"],
  key_use: ["Use it", "使用"],
  cancel: ["Cancel", "取消"],
  close: ["Close", "关闭"],
  unreachable: ["The server does not answer.", "服务器没有响应。"],
  needs_key: ["This needs a key, or an admin's.", "需要密钥或管理员密钥。"],
  retry_load: ["Try again", "重试"],
  loading: ["Loading …", "加载中…"],
  // Markdown
  copy: ["Copy", "复制"],
  copied: ["Copied", "已复制"],
  copy_failed: ["Not allowed", "未被允许"],
  code: ["Code", "代码"],
  table: ["Table", "表格"],
  // chat
  conversations: ["Conversations", "会话"],
  new_chat: ["New", "新建"],
  untitled: ["New conversation", "新会话"],
  delete: ["Delete", "删除"],
  delete_named: ["Delete “{0}”", "删除“{0}”"],
  delete_all: ["Delete all", "全部删除"],
  delete_sure: ["Delete all conversations of this browser?", "删除此浏览器中的所有会话？"],
  export: ["Export", "导出"],
  import: ["Import", "导入"],
  import_failed: ["This is no file that was exported here.", "这不是从此处导出的文件。"],
  not_lasting: ["This browser keeps nothing: conversations end with this tab.", "此浏览器不保存数据：会话随标签页关闭而结束。"],
  kept_here: ["Conversations are kept in this browser alone.", "会话只保存在此浏览器中。"],
  transcript: ["Messages", "消息"],
  you: ["You", "您"],
  model: ["Model", "模型"],
  tool: ["Tool", "工具"],
  system: ["System prompt", "系统提示"],
  message: ["Message", "消息"],
  write_here: ["Write a message", "输入消息"],
  write_keys: ["Enter sends, Shift+Enter breaks the line", "Enter 发送，Shift+Enter 换行"],
  send: ["Send", "发送"],
  stop: ["Stop", "停止"],
  retry: ["Retry", "重试"],
  edit: ["Edit", "编辑"],
  save_send: ["Send as a branch", "作为分支发送"],
  branch: ["Branch {0} of {1}", "分支 {0}/{1}"],
  earlier_branch: ["Earlier branch", "上一分支"],
  later_branch: ["Later branch", "下一分支"],
  thought: ["Reasoning", "推理"],
  calls: ["calls {0}", "调用 {0}"],
  call_result: ["Result of {0}", "{0} 的结果"],
  send_results: ["Send results", "发送结果"],
  stopped: ["Stopped.", "已停止。"],
  cut: ["Cut off: the length limit was reached.", "已截断：达到长度限制。"],
  answer_done: ["The answer is complete.", "回答完成。"],
  from_cache: ["{0} of {1} prompt tokens from the cache", "提示共 {1} 个词元，其中 {0} 个来自缓存"],
  first_token: ["first token {0} s", "首词元 {0} 秒"],
  per_s: ["{0} tokens/s", "{0} 词元/秒"],
  shares: ["shares its first {0} tokens with another branch", "与另一分支共享前 {0} 个词元"],
  as_read: ["The prompt as the model read it", "模型读到的提示"],
  as_read_hint: ["Shaded: computed before, taken from the cache.", "带底色部分：此前已计算，取自缓存。"],
  cached_part: ["From the cache: {0} %", "来自缓存：{0} %"],
  miss_new: ["New from here: it is not known that anybody asked this before.", "此处起为新内容：此前未见相同请求。"],
  miss_gone: ["Known before, and evicted for want of room, from token {0} on.", "自第 {0} 个词元起此前已缓存，因空间不足被淘汰。"],
  miss_diverged: ["Earlier requests went on differently after token {0}.", "之前的请求在第 {0} 个词元后内容不同。"],
  miss_namespace: ["Nothing is cached yet for this key or salt.", "此密钥或盐值下尚无缓存。"],
  miss_held: ["Held back: log-probabilities of the prompt were asked for.", "未使用缓存：请求了提示的对数概率。"],
  miss_flight: ["Another request was computing the same from token {0} on.", "另一请求正在计算第 {0} 个词元之后的相同内容。"],
  miss_state: ["Pages were there, but no recurrent state after token {0}.", "第 {0} 个词元后有缓存页，但没有循环状态。"],
  miss_slower: ["On disk from token {0} on, but computing is the shorter way.", "第 {0} 个词元后在磁盘上，但重新计算更快。"],
  miss_load: ["On disk from token {0} on, but it could not be loaded in time.", "第 {0} 个词元后在磁盘上，但未能及时载入。"],
  miss_disabled: ["The cache is off (--disable-radix-cache).", "缓存已关闭（--disable-radix-cache）。"],
  miss_none: ["All of the prompt that can come from the cache did.", "能来自缓存的部分都来自缓存。"],
  miss_evicted: ["Of what this conversation had computed, {0} tokens were no longer there.", "此会话先前计算的内容中有 {0} 个词元已不在缓存中。"],
  settings: ["Settings", "设置"],
  sampling: ["Sampling", "采样"],
  temperature: ["Temperature", "温度"],
  top_p: ["Top p", "Top p"],
  top_k: ["Top k", "Top k"],
  max_tokens: ["Most tokens", "最多词元"],
  seed: ["Seed", "种子"],
  default: ["default", "默认"],
  schema: ["JSON schema of the answer", "回答的 JSON Schema"],
  tools: ["Tools (JSON list)", "工具（JSON 列表）"],
  bad_json: ["{0}: this is no JSON of the right kind. {1}", "{0}：JSON 无效或类型不符。{1}"],
  welcome: ["Ask something.", "请提问。"],
  welcome_hint: [
    "Ask twice, or branch: the shaded part of a prompt was computed before and costs nothing again.",
    "再次提问或分支时，提示中带底色的部分此前已计算，无需重新计算。",
  ],
  // tree
  tree_summary: ["{0} nodes · {1} tokens cached · {2} of {3} pages in use · {4} free", "{0} 个节点 · 缓存 {1} 个词元 · 使用 {2}/{3} 页 · 空闲 {4} 页"],
  tree_help: [
    "Each bar is a stretch of tokens: from left to right by position, its width by their number. Drag or scroll to move, Ctrl+wheel or + and − to zoom; arrow keys walk, Enter follows the request, 0 shows all.",
    "每个矩形是一段词元：横向为位置，宽度为词元数。拖动或滚动可移动，Ctrl+滚轮或 +/− 缩放；方向键移动选择，Enter 跟随请求，0 显示全部。",
  ],
  tree_canvas: ["Radix tree of the cache", "缓存基数树"],
  live: ["live", "实时"],
  reconnecting: ["connecting …", "连接中…"],
  tree_empty: ["The cache is empty. Send a request and watch it grow.", "缓存为空。发送请求即可看到它增长。"],
  zoom_in: ["Zoom in", "放大"],
  zoom_out: ["Zoom out", "缩小"],
  fit: ["Show all", "显示全部"],
  as_table: ["As a table", "表格视图"],
  as_picture: ["As a picture", "图形视图"],
  node: ["Node", "节点"],
  parent: ["Parent", "父节点"],
  start: ["Start", "起点"],
  tokens: ["Tokens", "词元"],
  pages: ["Pages", "页"],
  on_disk: ["On disk", "磁盘上"],
  pages_on_disk: ["{0} pages on disk too", "{0} 页也在磁盘上"],
  idle: ["Last use", "最近使用"],
  locks: ["Locked by", "锁定"],
  namespace: ["Namespace", "命名空间"],
  ago: ["{0} ago", "{0} 前"],
  in_use: ["in use", "使用中"],
  node_said: ["Node {0}: tokens {1} to {2}, used {3}, {4} requests in it", "节点 {0}：词元 {1} 至 {2}，{3} 使用，{4} 个请求"],
  stored_said: ["{0} of {1} pages on disk too", "{1} 页中 {0} 页也在磁盘上"],
  answer_said: ["an answer in the making from token {0} on", "自词元 {0} 起为正在生成的回答"],
  guesses: ["{0} of {1} guesses right", "猜测 {1} 个，正确 {0} 个"],
  select_node: ["Point at a bar, or walk with the arrow keys, to read its text.", "指向矩形或用方向键选择，以查看文本。"],
  text_gone: ["Its text is gone, or belongs to somebody else.", "文本已不存在，或属于他人。"],
  text_cut: ["… cut", "…已截断"],
  who_shares: ["Who shares this prompt?", "谁共享此提示？"],
  find: ["Find", "查找"],
  found: ["{0} of {1} tokens are in the cache.", "{1} 个词元中有 {0} 个在缓存中。"],
  found_none: ["None of its {0} tokens are in the cache.", "{0} 个词元都不在缓存中。"],
  found_by: ["Running in it now: {0}", "当前运行其中：{0}"],
  prompt: ["Prompt", "提示"],
  requests_here: ["Requests", "请求"],
  follow: ["Follow", "跟随"],
  following: ["Following {0}", "跟随 {0}"],
  unfollow: ["Stop following", "停止跟随"],
  evicted: ["Evicted in the last minutes", "最近几分钟内淘汰"],
  evicted_none: ["Nothing.", "无。"],
  evicted_line: ["{0} tokens from position {1}, unused for {2}", "位置 {1} 起 {0} 个词元，闲置 {2}"],
  kept_on_disk: [", {0} of {1} pages still on disk", "，{1} 页中 {0} 页仍在磁盘上"],
  happened: ["Happened", "事件"],
  began_line: ["{0}: {1} of {2} prompt tokens cached. {3}", "{0}：{2} 个提示词元中 {1} 个命中。{3}"],
  ended_line: ["{0}: ended ({1}) with {2} tokens after {3} s", "{0}：结束（{1}），{2} 个词元，{3} 秒"],
  legend_now: ["just used", "刚使用"],
  legend_old: ["an hour ago", "一小时前"],
  legend_locked: ["a request runs in it", "请求运行中"],
  legend_answer: ["an answer in the making", "正在生成的回答"],
  legend_disk: ["on disk too", "也在磁盘上"],
  legend_kept: ["asked to be kept", "请求保留"],
  rows: ["Rows {0} to {1} of {2}", "第 {0}–{1} 行，共 {2} 行"],
  earlier: ["Earlier", "上一页"],
  later: ["Later", "下一页"],
  // now
  requests: ["Requests", "请求"],
  running: ["running", "运行中"],
  waiting: ["waiting", "等待中"],
  no_requests: ["No request is running.", "当前没有请求。"],
  and_more: ["and {0} more", "另有 {0} 个"],
  speed: ["Generated now", "当前生成"],
  hit_rate: ["Hit rate, last hour", "近一小时命中率"],
  hit_rate_all: ["since the start {0}", "自启动以来 {0}"],
  pages_used: ["Pages in use", "使用中的页"],
  pages_line: ["{0} cached · {1} free · {2} in all", "缓存 {0} · 空闲 {1} · 共 {2}"],
  requests_hour: ["Requests, last hour", "近一小时请求"],
  last_hour: ["Last hour", "近一小时"],
  ttft: ["First token", "首词元"],
  gap: ["Between tokens", "词元间隔"],
  count: ["Count", "次数"],
  progress: ["Progress", "进度"],
  state: ["State", "状态"],
  age: ["Age", "时长"],
  cached: ["Cached", "缓存"],
  output: ["Output", "输出"],
  why_not: ["Why no more", "未命中原因"],
  waits_for: ["waits for {0}", "等待：{0}"],
  uptime: ["up {0}", "已运行 {0}"],
  draining: ["The server is shutting down.", "服务器正在关闭。"],
  log: ["Log", "日志"],
  log_admin: ["The log is for who has an admin's key.", "日志仅管理员密钥可见。"],
  log_missed: ["{0} lines are no longer kept.", "{0} 行已不再保留。"],
  configuration: ["Configuration", "配置"],
  name: ["Name", "名称"],
  links: ["Links", "链接"],
  // docs
  docs_title: ["Routes of this server", "此服务器的接口"],
  docs_hint: ["From {0}. The same routes serve programs and this page.", "来自 {0}。程序与此页面使用相同的接口。"],
  filter: ["Filter", "筛选"],
  open_to_all: ["no key needed", "无需密钥"],
  body: ["Body", "请求体"],
  answer: ["Answer", "回答"],
  query: ["Query, such as limit=10", "查询参数，如 limit=10"],
  try_it: ["Try it", "试用"],
  send_request: ["Send", "发送"],
  required: ["required", "必填"],
  any_value: ["any", "任意"],
  body_cut: ["… the rest is not shown", "…其余未显示"],
  changes_server: ["Routes that change the server want an admin's key where there is one.", "更改服务器的接口需要管理员密钥（若已设置）。"],
};

let current = firstLanguage();

function firstLanguage() {
  const chosen = settings.getItem("mooli.language");
  if (chosen === "en" || chosen === "zh") return chosen;
  const known = (navigator.languages ?? [navigator.language]).find((one) => /^(en|zh)/i.test(one));
  return /^zh/i.test(known ?? "") ? "zh" : "en";
}

/** "en" or "zh": what was chosen here, else the browser's. */
export const language = () => current;

export function setLanguage(name) {
  current = name;
  settings.setItem("mooli.language", name);
}

/** The words of that name, {0}, {1}, … replaced. */
export function t(name, ...values) {
  const words = WORDS[name]?.[language() === "zh" ? 1 : 0] ?? name;
  return values.length ? words.replace(/\{(\d)\}/g, (_, i) => String(values[i])) : words;
}

export const num = (value, digits = 0) =>
  value == null ? "–" : Number(value).toLocaleString(language() === "zh" ? "zh-CN" : "en", { maximumFractionDigits: digits });

export const percent = (share) => (share == null ? "–" : `${num(100 * share, 1)} %`);

/** A span of time in words as short as they may be. */
export function span(seconds) {
  if (seconds == null) return "–";
  if (seconds < 1) return `${num(seconds * 1000)} ms`;
  if (seconds < 10) return `${num(seconds, 1)} s`;
  if (seconds < 60) return `${num(seconds)} s`;
  if (seconds < 3600) return `${num(seconds / 60)} min`;
  if (seconds < 86400) return `${num(seconds / 3600, 1)} h`;
  return `${num(seconds / 86400, 1)} d`;
}

/** Why no more of a prompt was found, in words. miss: {reason, tokens} of the engine, or null. */
export function missWords(miss) {
  if (!miss) return t("miss_none");
  const names = { new: "miss_new", evicted: "miss_gone", diverged: "miss_diverged", namespace: "miss_namespace", "held back": "miss_held", "in flight": "miss_flight", "no state": "miss_state", "judged slower": "miss_slower", "load failed": "miss_load", disabled: "miss_disabled" };
  return names[miss.reason] ? t(names[miss.reason], num(miss.tokens)) : miss.reason;
}
