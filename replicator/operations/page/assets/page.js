// Takes over what the replicator sends every second, and says so when it has gone silent.
"use strict";
(() => {
  const SILENT_MS = 3500; // three updates are missing
  const AGAIN_MS = 1500;
  const root = document.documentElement;
  const silence = document.getElementById("silence");
  const held = new Map(); // parts that somebody is reading with the cursor or the keyboard
  let heard = Date.now();

  const busy = (part) => {
    const selection = document.getSelection();
    const selected = selection && !selection.isCollapsed && part.contains(selection.anchorNode);
    return selected || (part.contains(document.activeElement) && part !== document.activeElement);
  };

  const show = () => {
    for (const [id, html] of held) {
      const part = document.getElementById(id);
      if (id !== "headline" && busy(part)) continue;
      part.innerHTML = html;
      held.delete(id);
    }
  };

  const take = (message) => {
    const news = JSON.parse(message.data);
    if (news.version !== root.dataset.version) return location.reload();
    heard = Date.now();
    for (const [id, html] of Object.entries(news.parts)) held.set(id, html);
    show();
    root.dataset.state = news.state;
    document.title = news.title;
    silence.hidden = true;
  };

  const listen = () => {
    const updates = new EventSource("updates");
    updates.onmessage = take;
    updates.onerror = () => {
      updates.close();
      setTimeout(listen, AGAIN_MS);
    };
  };

  const watch = () => {
    if (Date.now() - heard < SILENT_MS || !silence.hidden) return;
    const since = new Date(heard).toISOString().slice(11, 19);
    silence.querySelector("b").textContent = `No word from the replicator since ${since} UTC.`;
    silence.hidden = false;
    root.dataset.state = "silent";
    document.title = "No word · " + root.dataset.slot;
  };

  listen();
  setInterval(watch, 500);
})();
