// Before anything is drawn: the theme chosen on an earlier visit. Without one the page follows the system.
try {
  const chosen = localStorage.getItem("rlkit.theme");
  if (chosen === "light" || chosen === "dark") document.documentElement.dataset.theme = chosen;
} catch {
  // storage is switched off: follow the system
}
